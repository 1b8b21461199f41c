"""The loop on a tiny random model: it learns, it stops and resumes exactly, it survives being killed."""

import json
import multiprocessing
import random
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch

from openling.config.train import TrainConfig
from openling.data.pack import Batches
from openling.errors import Failure, UserError
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.ops.cpu import settle_bf16_matmuls
from openling.train import checkpoint as checkpoint_module
from openling.train import while_training
from openling.train.checkpoint import latest_checkpoint, sole_writer
from openling.train.loop import train
from openling.train.optim import adamw, select_parameters
from openling.train.schedule import learning_rate

ATTENTION = (r"\.query_key_value\.", r"\.g_proj\.")
SAME_EVERY_TIME = ("step", "tokens", "loss", "ce", "kl", "grad_norm", "lr")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads only cost time at this size, and a sum's order depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(seed=0):
    config = ModelConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, layer_kinds=("lightning", "gqa", "mla"), kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def tiny_windows():
    """A text with structure: each token follows from the one before, with a tenth of noise."""
    rng = np.random.default_rng(0)
    tokens = [1]
    for _ in range(40 * 16):
        tokens.append(int(rng.integers(61)) if rng.random() < 0.1 else (tokens[-1] * 7 + 3) % 61)
    return np.asarray(tokens[: 40 * 16], np.int32).reshape(40, 16)


def tiny_config(**changes):
    values = {"steps": 12, "batch_size": 8, "sequence_length": 16, "lr": 3e-3, "warmup_steps": 3, "schedule": "cosine", "seed": 5}
    return TrainConfig(**values | changes)


def run_training(run, config, *, model=None, parameters=ATTENTION, batches=None, **options):
    model = model or tiny_model()
    batches = batches or Batches(tiny_windows(), batch_size=config.batch_size, seed=config.seed)
    result = train(model, config, batches, parameters=parameters, run=run, progress=False, **options)
    return model, result


def metrics(run):
    return [{k: row[k] for k in SAME_EVERY_TIME} for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def assert_same_weights(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_loss_falls_and_frozen_parameters_keep_their_bits(tmp_path):
    config = tiny_config(steps=60, lr=1e-2, batch_size=16)
    parameters = ["word_embeddings", r"layers\.[12]\."]
    model, result = run_training(tmp_path, config, parameters=parameters)
    rows = metrics(tmp_path)
    assert result.stopped == "finished" and result.steps == 60 and result.tokens == 60 * 16 * 16
    # A random model starts near ln 61 = 4.11; a tenth of the tokens is noise, so 0.1 ln 61 and the noise's entropy remain.
    assert abs(rows[0]["loss"] - np.log(61)) < 0.1
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    start = dict(tiny_model().named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) == (not any(re.search(x, name) for x in parameters)), name
        assert p.requires_grad and p.grad is None


def test_kl_pulls_the_student_to_its_teacher(tmp_path):
    teacher = tiny_model(seed=1)
    for p in teacher.parameters():
        p.data.mul_(4)  # a random model that is sure of something
    student = tiny_model(seed=1)
    student.load_state_dict(teacher.state_dict())
    torch.nn.init.normal_(student.model.layers[1].attention.query_key_value.weight, std=0.1)
    config = tiny_config(steps=80, ce=0.0, kl=1.0, lr=1e-2, precision="fp32", weight_decay=0.0)
    run_training(tmp_path, config, model=student, parameters=["layers.1.attention.query_key_value"], teacher=teacher)
    rows = metrics(tmp_path)
    assert rows[-1]["kl"] < 0.5 * rows[0]["kl"]
    assert rows[-1]["loss"] == rows[-1]["kl"]


def test_alignment_alone_pulls_every_layer_to_the_teachers(tmp_path):
    """Without CE and KL: a layer that was spoilt comes back, by its hidden states alone."""
    teacher, student = tiny_model(seed=1), tiny_model(seed=1)
    torch.nn.init.normal_(student.model.layers[0].attention.dense.weight, std=0.5)
    config = tiny_config(steps=40, ce=0.0, align=1.0, lr=3e-2, precision="fp32", weight_decay=0.0)
    run_training(tmp_path, config, model=student, parameters=["layers.0.attention.dense"], teacher=teacher)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["align"] < 0.2 * rows[0]["align"]
    assert all(row["loss"] == row["align"] and row["kl"] is None for row in rows)


def test_accumulation_equals_the_big_batch(tmp_path):
    models = []
    for parts in (1, 4):
        config = tiny_config(steps=1, accumulation=parts, precision="fp32")
        models.append(run_training(tmp_path / str(parts), config)[0])
    big, small = metrics(tmp_path / "1")[0], metrics(tmp_path / "4")[0]
    # The same sum over 120 tokens in another order: 120 roundings of 2^-24 at the most, about 7e-6 relative.
    assert big["loss"] == pytest.approx(small["loss"], rel=7e-6)
    assert big["grad_norm"] == pytest.approx(small["grad_norm"], rel=7e-6)


def test_resume_is_exact_to_the_bit(tmp_path):
    straight, _ = run_training(tmp_path / "a", tiny_config(accumulation=2))
    # The time box cuts the run after its first step; the chosen weights of the next model must all come from the checkpoint.
    _, first = run_training(tmp_path / "b", tiny_config(accumulation=2, max_seconds=1e-9))
    assert (first.stopped, first.steps) == ("time", 1)
    fresh = tiny_model()
    for p in select_parameters(fresh, ATTENTION).values():
        torch.nn.init.normal_(p)
    resumed, second = run_training(tmp_path / "b", tiny_config(accumulation=2, checkpoint_steps=4), resume=True, model=fresh)
    assert (second.stopped, second.steps) == ("finished", 12)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert_same_weights(straight, resumed)


def _train_in_child(run, resume):
    torch.set_num_threads(1)
    run_training(run, tiny_config(steps=200, checkpoint_steps=2), resume=resume)


def _step(run):
    checkpoint = latest_checkpoint(run)
    return int(checkpoint.name.removeprefix("step_")) if checkpoint else 0


@pytest.mark.parametrize("pays", [True, False])
def test_precision_is_the_faster_one_and_stays_with_a_run(tmp_path, pays):
    """A run that resumes on another processor goes on in the precision that it began with."""
    try:
        settle_bf16_matmuls(pays)
        config = tiny_config(max_seconds=1e-9)
        run_training(tmp_path / "run", config)
        settle_bf16_matmuls(not pays)
        run_training(tmp_path / "run", tiny_config(), resume=True)
        settle_bf16_matmuls(pays)
        named = tiny_config(precision="bf16" if pays else "fp32")
        run_training(tmp_path / "named", named)
        settle_bf16_matmuls(pays)
        run_training(tmp_path / "other", tiny_config(precision="fp32" if pays else "bf16"))
    finally:
        settle_bf16_matmuls(None)
    resumed, named, other = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "named", "other")
    )
    assert resumed == named != other


def test_kill_9_leaves_a_folder_that_resumes_exactly(tmp_path):
    run, rng, steps = tmp_path / "killed", random.Random(0), [0]
    # The fork server imports torch once; each child then starts at once, from a process in which no operation has run.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["openling.train.loop", "torch._dynamo"])  # AdamW imports the latter
    for kill in range(8):
        child = processes.Process(target=_train_in_child, args=(run, (run / "train.json").exists()))
        child.start()
        # The even kills come some time after a new checkpoint, the odd ones at any moment since the start.
        while kill % 2 == 0 and child.is_alive() and _step(run) == steps[-1]:
            time.sleep(0.005)
        child.join(rng.uniform(0.0, 0.3))
        child.kill()
        child.join()
        steps.append(_step(run))
    assert steps == sorted(steps)
    assert len({s for s in steps if 0 < s < 200}) >= 2, f"too few kills fell inside the run: {steps}"
    killed, result = run_training(run, tiny_config(steps=200), resume=True)
    straight, _ = run_training(tmp_path / "straight", tiny_config(steps=200))
    assert result.stopped == "finished"
    assert metrics(run) == metrics(tmp_path / "straight")
    assert_same_weights(killed, straight)


def test_the_clock_does_not_wait_for_a_slow_disk(tmp_path, monkeypatch):
    """A checkpoint that is due while the one before is being written comes later; the last one waits."""
    written, write = threading.Event(), checkpoint_module._write_files
    monkeypatch.setattr(checkpoint_module, "_write_files", lambda *args, **kwargs: written.wait(60) and write(*args, **kwargs))

    class Watched(Batches):
        def batch(self, step):
            if step == 30:  # read a few steps ahead
                written.set()
            return super().batch(step)

    batches, config = Watched(tiny_windows(), batch_size=8, seed=5), tiny_config(steps=40, checkpoint_seconds=1e-9)
    train(tiny_model(), config, batches, parameters=ATTENTION, run=tmp_path, progress=False)
    saves = [row["save_seconds"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert saves[1] > 0 and saves[2:16] == [0.0] * 14
    assert latest_checkpoint(tmp_path).name == "step_40"


class Interrupting:
    """A tracker that the main thread calls behind every step."""

    def __init__(self, number, times=1):
        self.number, self.times = number, times

    def log(self, row):
        if row["step"] == 3:
            for _ in range(self.times):
                signal.raise_signal(self.number)

    def finish(self):
        pass


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(while_training, "ONE_SIGNAL_SECONDS", -1.0)  # what comes at once is another one then
    before = signal.getsignal(signal.SIGINT)
    batches = Batches(tiny_windows(), batch_size=8, seed=5)
    options = {"parameters": ATTENTION, "run": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), tiny_config(), batches, **options, trackers=[Interrupting(signal.SIGINT, times=2)])
    assert signal.getsignal(signal.SIGINT) is before and latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_on_a_whole_step_with_a_checkpoint(tmp_path, number, times):
    before = signal.getsignal(number)
    config = tiny_config()
    batches = Batches(tiny_windows(), batch_size=8, seed=5)
    options = {"parameters": ATTENTION, "run": tmp_path, "progress": False}
    result = train(tiny_model(), config, batches, **options, trackers=[Interrupting(number, times)])
    assert (result.stopped, result.signal, result.steps) == ("signal", number, 3)
    assert latest_checkpoint(tmp_path).name == "step_3"
    assert signal.getsignal(number) is before
    run_training(tmp_path, config, resume=True)
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 13))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_evidence(tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(Failure, match="step 1"):
        run_training(tmp_path, tiny_config(), model=model)
    evidence = json.loads((tmp_path / "evidence" / "step_1.json").read_text())
    assert evidence["input_ids"] == Batches(tiny_windows(), batch_size=8, seed=5).batch(0).ids.tolist()
    assert "model.layers.0.attention.query_key_value.weight" in evidence["gradients_not_finite"]
    assert all(torch.equal(p.nan_to_num(), weights[n].nan_to_num()) for n, p in model.named_parameters())


def test_mistakes_are_told(tmp_path):
    done = tmp_path / "done"
    run_training(done, tiny_config(steps=2))
    cases = [
        ("nothing to resume", tmp_path / "new", tiny_config(), {"resume": True}),
        ("holds a run already", done, tiny_config(steps=2), {}),
        ("where: +lr", done, tiny_config(steps=2, lr=1.0), {"resume": True}),
        ("other parameters", done, tiny_config(steps=2), {"resume": True, "parameters": ["g_proj"]}),
        ("needs a teacher", tmp_path / "x", tiny_config(kl=1.0), {}),
        ("where: +align", tmp_path / "x", tiny_config(align=1.0), {}),
        ("nearest", tmp_path / "x", tiny_config(), {"parameters": ["model.norms.weight"]}),
        (
            "configured shape",
            tmp_path / "x",
            tiny_config(batch_size=4),
            {"batches": Batches(tiny_windows(), batch_size=8, seed=5)},
        ),
    ]
    for message, run, config, options in cases:
        with pytest.raises(UserError, match=message):
            run_training(run, config, **options)
    with sole_writer(done), pytest.raises(UserError, match="another process"):
        run_training(done, tiny_config(steps=2), resume=True)


def test_what_is_refused_writes_no_record(tmp_path):
    run_training(tmp_path / "one", tiny_config(steps=2))
    (tmp_path / "one" / "train.json").unlink()
    for resume in (False, True):
        with pytest.raises(UserError, match="is missing[\\s\\S]*train.json[\\s\\S]*put it back, or remove"):
            run_training(tmp_path / "one", tiny_config(steps=2), resume=resume)
    stray = tmp_path / "two" / "checkpoints" / "step_5"
    stray.mkdir(parents=True)
    with pytest.raises(UserError, match="damaged[\\s\\S]*step_5: it has no manifest.json"):
        run_training(tmp_path / "two", tiny_config(steps=2))
    assert not list(tmp_path.glob("*/train.json"))


def test_damaged_checkpoint_and_other_data_are_told(tmp_path):
    run_training(tmp_path, tiny_config(max_seconds=1e-9))
    batches = Batches(tiny_windows()[::-1].copy(), batch_size=8, seed=5)
    with pytest.raises(UserError, match="training data differ"):
        train(tiny_model(), tiny_config(), batches, parameters=ATTENTION, run=tmp_path, resume=True, progress=False)
    weights = tmp_path / "checkpoints" / "step_1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(UserError, match="damaged"):
        run_training(tmp_path, tiny_config(), resume=True)


def test_learning_rate_schedule():
    c = tiny_config(steps=11, warmup_steps=4, lr=1.0, min_lr_ratio=0.2)
    rates = [learning_rate(s, c) for s in range(11)]
    # Rise by quarters; then a cosine over 7 steps whose middle is the mean of both ends.
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.6, abs=1e-15)
    assert rates[10] == pytest.approx(0.2, abs=1e-15)
    assert {learning_rate(s, tiny_config(steps=11, warmup_steps=0, schedule="constant")) for s in range(11)} == {3e-3}
    assert tiny_config(steps=None, tokens=8 * 16 * 3 + 1).total_steps == 4


def test_weight_decay_spares_vectors():
    groups = adamw(list(tiny_model().parameters()), tiny_config()).param_groups
    assert {(p.dim() >= 2, g["weight_decay"]) for g in groups for p in g["params"]} == {(True, 0.1), (False, 0.0)}


@pytest.mark.parametrize(
    "wrong", [{"steps": 3, "tokens": 5}, {"batch_size": 6, "accumulation": 4}, {"kl": 0.0, "ce": 0.0}, {"stepz": 1}]
)
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match="steps and tokens|does not divide|no loss|stepz"):
        tiny_config(**wrong)


def test_plain_lines_when_not_on_a_terminal(tmp_path, capfd):
    batches = Batches(tiny_windows(), batch_size=8, seed=5)
    train(tiny_model(), tiny_config(), batches, parameters=ATTENTION, run=tmp_path / "a", progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("step 12/12  loss ") and "tokens/s" in lines[-1] and len(lines) == 1
    run_training(tmp_path / "b", tiny_config())
    assert capfd.readouterr() == ("", "")


def test_a_warm_up_longer_than_the_run_is_told(tmp_path, capfd):
    batches = Batches(tiny_windows(), batch_size=8, seed=5)
    train(tiny_model(), tiny_config(steps=2, warmup_steps=30), batches, parameters=ATTENTION, run=tmp_path / "a")
    assert "rises over 30 steps, and the run has 2" in capfd.readouterr().err
