"""Measures against plain formulas on whole logits in FP64, and sizes of real caches."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openling.config.migrate import Recall
from openling.data.needle import make_needle
from openling.migrate import measure, measurer
from openling.model.config import ModelConfig
from openling.model.generate import Sampling, generate
from openling.model.ling import Ling

GQA = ModelConfig(
    vocab_size=260,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    layer_kinds=("gqa",) * 4,
    initializer_range=0.2,
)
HYBRID = GQA.replace(
    layer_kinds=("lightning", "lightning", "lightning", "mla"),
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)


def random_model(config, seed):
    model = Ling(config).double()
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="module")
def teacher():
    return random_model(GQA, 0)


@pytest.fixture(scope="module")
def student():
    return random_model(HYBRID, 1)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(260, (5, 21), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Two windows at a time, the last batch smaller."""
    monkeypatch.setattr(measure, "BATCH_TOKENS", 2 * 21)


@torch.no_grad()
def test_agreement_is_the_plain_formula(student, teacher, windows):
    ours, theirs = student(windows)[:, :-1], teacher(windows)[:, :-1]
    targets = windows[:, 1:]
    ce = F.cross_entropy(ours.flatten(0, 1), targets.flatten(), reduction="none").view(5, 20)
    teacher_ce = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="none").view(5, 20)
    kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum") / 100
    found = measure.agreement(student, teacher, windows)
    expected = {
        "loss": ce.mean(),
        "loss_stderr": ce.mean(1).std() / math.sqrt(5),
        "perplexity": ce.mean().exp(),
        "teacher_loss": teacher_ce.mean(),
        "gap": (ce - teacher_ce).mean(),
        "gap_stderr": (ce - teacher_ce).mean(1).std() / math.sqrt(5),
        "kl": kl,
        "top1": (ours.argmax(-1) == theirs.argmax(-1)).double().mean(),
        "tokens": 100,
    }
    # FP64 models stay in FP64 to the end: what differs is the order of sums.
    assert found == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-10, abs=1e-12)
    json.dumps(found)


def test_a_recorded_teacher_gives_the_same_and_is_not_run_again(student, teacher, windows, monkeypatch):
    trace = measure.TeacherTrace.record(teacher, windows)
    expected = measure.agreement(student, teacher, windows)
    monkeypatch.setattr(teacher.model, "forward", None)
    assert measure.agreement(student, trace, windows) == expected


def test_a_model_agrees_with_itself(teacher, windows):
    found = measure.agreement(teacher, teacher, windows)
    assert (found["kl"], found["top1"], found["gap"], found["gap_stderr"]) == (0.0, 1.0, 0.0, 0.0)
    assert found["loss"] == found["teacher_loss"]


def recorded_attention(model, ids):
    """Input and output of every layer's attention block in an ordinary forward pass, by hooks."""
    seen = []
    hooks = [layer.register_forward_hook(lambda m, args, out: seen.append(args[0])) for layer in model.model.layers] + [
        layer.attention.register_forward_hook(lambda m, args, out: seen.append(out)) for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    # An attention block finishes before the layer that holds it.
    return list(zip(seen[1::2], seen[0::2], strict=True))


@torch.no_grad()
def test_layer_errors_are_those_of_hooked_forward_passes(student, teacher, windows):
    found = measure.layer_measures(student, teacher, windows).errors
    calls = []
    hook = student.model.layers[0].attention.register_forward_hook(lambda m, args, out: calls.append(args[1]))
    student(windows)
    hook.remove()
    ours, theirs = recorded_attention(student, windows), recorded_attention(teacher, windows)
    for i, row in enumerate(found):
        layer, (h, y) = student.model.layers[i], theirs[i]
        local = layer.attention(layer.input_layernorm(h), calls[0]) - y
        assert (row["layer"], row["kind"]) == (i, HYBRID.layer_kinds[i])
        assert row["local"] == pytest.approx(float(local.square().sum() / y.square().sum()), rel=1e-9)
        assert row["propagated"] == pytest.approx(float((ours[i][1] - y).square().sum() / y.square().sum()), rel=1e-9)


def test_mtp_layers_are_measured_too(windows):
    teacher = random_model(GQA.replace(num_nextn_predict_layers=1, mtp_layer_kind="gqa"), 0)
    student = random_model(HYBRID.replace(num_nextn_predict_layers=1), 0)
    rows = measure.layer_measures(student, teacher, windows).errors
    assert [row["kind"] for row in rows] == [*HYBRID.layer_kinds, "mla"]
    assert rows[-1]["local"] > 0
    assert rows[-1]["propagated"] > 0


def test_a_model_has_no_error_against_itself(teacher, windows):
    assert all(row["local"] == row["propagated"] == 0.0 for row in measure.layer_measures(teacher, teacher, windows).errors)


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


TOKENIZER = byte_tokenizer()
FILLER = TOKENIZER("Call me Ishmael. Some years ago, never mind how long precisely, " * 20)["input_ids"]


class Oracle(torch.nn.Module):
    """Answers needle cases rightly, but for those in `fails`: what a perfect and a failing model would put out."""

    def __init__(self, fails):
        super().__init__()
        self.lm_head = torch.nn.Linear(260, 260, bias=False)
        torch.nn.init.eye_(self.lm_head.weight)
        self.fails, self.case = fails, 0

    def model(self, ids):
        h = F.one_hot(ids.roll(-1, 1), 260).float()
        for row in range(len(ids)):
            if self.case in self.fails:
                h[row, -3] = F.one_hot(ids[row, -2] + 1, 260).float()  # the last but one token wrong
            self.case += 1
        return h

    def logits(self, h):
        return self.lm_head(h)


def test_recall_counts_whole_answers():
    arguments = {"lengths": (120, 200), "depths": (0.0, 0.5, 1.0), "samples": 2}
    found = measure.needle_recall(Oracle(fails={0, 4, 7}), TOKENIZER, FILLER, **arguments)

    def depths(*failed):
        rows = zip((0.0, 0.5, 1.0), failed, strict=True)
        return [{"depth": d, "exact": 1 - f / 2, "token_accuracy": (12 - f) / 12, "n": 2} for d, f in rows]

    # Six cases a length; a byte-level answer has six tokens, one of them wrong in a failed case.
    assert found == [
        {"length": 120, "exact": 4 / 6, "token_accuracy": 34 / 36, "n": 6, "depths": depths(1, 0, 1)},
        {"length": 200, "exact": 5 / 6, "token_accuracy": 35 / 36, "n": 6, "depths": depths(1, 0, 0)},
    ]


@pytest.mark.parametrize(
    ("keys", "among", "said"), [(4, [300], ["1 of 1: 8 of 8", "1 of 4: 1 of 4"]), (1, [], ["1 of 1: 8 of 8"])]
)
def test_a_stage_asks_for_the_only_fact_and_for_one_of_several(teacher, student, monkeypatch, keys, among, said):
    """At 64 tokens no fact fits, at 120 one does and four do not."""

    def found(model, tokenizer, filler, *, lengths, depths, samples, keys, bf16):
        return [{"length": n, "exact": 1 / keys, "n": len(depths) * samples} for n in lengths]

    monkeypatch.setattr(measurer, "needle_recall", found)
    windows = {"a": np.array(FILLER[:640], dtype=np.int32).reshape(2, 320)}
    recall = Recall(lengths=(64, 120, 300), depths=(0.1, 0.9), samples=2, keys=keys)
    measures = measurer.Measurer(teacher, TOKENIZER, windows, recall=recall, bf16=False)
    stage = measures.stage(student, walk=False)
    assert [(row["length"], row["exact"]) for row in stage["needle"]] == [(120, 1), (300, 1)]
    assert [(row["length"], row["exact"]) for row in stage["needle_among"]] == [(n, 1 / keys) for n in among]
    assert (stage["needle_left_out"], stage["needle_keys"]) == ([64], keys)
    line = measures.line(stage | {"name": "mla", "seconds": 1.0})
    assert line.rpartition("  [")[0].split("; ")[1:] == [f"needles, {part}" for part in said]


def test_teacher_forced_recall_is_greedy_recall(teacher):
    """A random model is trained for a moment on one case, so that both answers occur."""
    case = make_needle(TOKENIZER, FILLER, length=120, depth=0.5, seed=0)
    model, ids = random_model(GQA, 3), torch.tensor([case.prompt + case.answer])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
        optimizer.step()
    exact = []
    for seed in range(3):
        one = make_needle(TOKENIZER, FILLER, length=120, depth=0.5, seed=seed)
        greedy = generate(model, torch.tensor([one.prompt]), Sampling(max_new_tokens=len(one.answer)), stop_ids=())[0]
        arguments = {"lengths": (120,), "depths": (0.5,), "samples": 1}
        recall = measure.needle_recall(model, TOKENIZER, FILLER, **arguments, seed=seed)[0]["exact"]
        assert recall == float(greedy == one.answer)
        exact.append(recall)
    assert exact[0] == 1.0


def test_samples_are_greedy_and_stop_at_the_end_token(teacher):
    free = measure.sample_completions(teacher, TOKENIZER, ["Hello", "Once upon"], max_new_tokens=9)
    ids = torch.tensor([TOKENIZER("Once upon")["input_ids"]])
    new = generate(teacher, ids, Sampling(max_new_tokens=9), stop_ids=())[0]
    assert free[1] == {"prompt": "Once upon", "completion": TOKENIZER.decode(new)}
    stopping = Ling(GQA.replace(eos_token_id=[999, new[4]])).double()
    stopping.load_state_dict(teacher.state_dict())
    found = measure.sample_completions(stopping, TOKENIZER, ["Once upon"], max_new_tokens=9)
    assert found[0]["completion"] == TOKENIZER.decode(new[: new.index(new[4]) + 1])


@pytest.mark.parametrize("config", [GQA, HYBRID], ids=["gqa", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_profile_counts_the_formula_and_a_real_cache(config, dtype):
    model = random_model(config, 0).to(dtype)
    rows = measure.decode_profile(model, (40, 300), steps=3)
    for row, context in zip(rows, (40, 300), strict=True):
        cache = model.new_cache()
        with torch.inference_mode():
            model(torch.zeros(1, context, dtype=torch.long), cache=cache)
        assert row["context"] == context
        assert row["cache_bytes"] == cache.nbytes
        # The goal is 1 %; nothing is padded or shared, so it is exact.
        assert row["cache_bytes"] == row["formula_bytes"]
        assert row["ms_per_token"] > 0
        assert row["peak_bytes"] > row["cache_bytes"]


def test_a_noise_cache_is_what_the_next_step_expects(student):
    """Same shapes and dtypes as after a real prefill, and steps do not make it grow."""
    noise, real = measure.noise_cache(student, 30, spare=2), student.new_cache()
    with torch.inference_mode():
        student(torch.zeros(1, 30, dtype=torch.long), cache=real)
        held = [layer.keys._data for layer in noise.layers]
        for _ in range(2):
            student(torch.zeros(1, 1, dtype=torch.long), cache=noise)
            student(torch.zeros(1, 1, dtype=torch.long), cache=real)
    assert noise.length == real.length == 32
    assert noise.nbytes == real.nbytes
    assert all(layer.keys._data is before for layer, before in zip(noise.layers, held, strict=True))
