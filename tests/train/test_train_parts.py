"""The parts of a recipe: balancing, Muon, schedules, ramps, steps that are left out, checkpoints that are kept."""

import itertools
import json

import pytest
import torch
from packed_training import MIXED, Ramped, documents, hybrid, run

from openling.config.train import BatchRamp, TrainConfig
from openling.errors import Failure, UserError
from openling.parallel.apply import Parallel
from openling.train import checkpoint, muon
from openling.train.balance import imbalance, shifted_bias
from openling.train.checkpoint import checkpoints
from openling.train.guard import Guard
from openling.train.metrics import MetricsLog
from openling.train.muon import Muon, orthogonalised
from openling.train.optim import in_muon
from openling.train.ranks import Ranks
from openling.train.rules import most_kept
from openling.train.schedule import learning_rate
from openling.train.wsm import chosen_checkpoints


@pytest.mark.parametrize(
    ("load", "update"),
    [([10, 30, 20, 20], [1, -1, 0, 0]), ([10, 50, 10, 10], [0.5, -1.5, 0.5, 0.5]), ([7, 7, 7, 7], [0, 0, 0, 0])],
)
def test_bias_update_equals_the_published_table(load, update):
    bias = torch.tensor([0.25, -0.5, 0.125, 0.125])
    found = shifted_bias(bias, torch.tensor(load), 2**-10)
    assert torch.equal(found - bias, 2**-10 * torch.tensor(update, dtype=torch.float32))
    assert float(found.sum()) == float(bias.sum())  # powers of two: no rounding


def test_bias_evens_the_load_and_keeps_its_sum(tmp_path):
    """A router that prefers two experts; every token is counted once, parts of a batch together."""
    model = hybrid()
    gate = model.model.layers[1].mlp.gate
    torch.nn.init.normal_(gate.weight, std=0.05)
    gate.expert_bias.copy_(torch.tensor([0.1, 0.1, -0.1, -0.1]))
    source = Ramped(documents(), length=24, rows=8)
    config = MIXED(steps=40, batch_size=8, accumulation=2, sequence_length=24, bias_rate=0.004, lr=1e-4)
    run(tmp_path, config, source, model=model)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = [r["imbalance"] for r in rows[-8:]]
    # The layer sends every token to two of its four experts at first: 2 there, about 1.2 by chance in the two other layers.
    assert rows[0]["imbalance"] > 1.3 and sum(last) / 8 < 1.2, last
    assert abs(float(gate.expert_bias.sum())) < 40 * 4 * 2**-24  # one rounding per expert and update, values below 1
    assert not gate.expert_bias.requires_grad
    assert imbalance(torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0]])) == 2.5


@pytest.mark.parametrize("together", [1, 2 * 60 * 2, 1 << 20])
def test_muon_equals_torchs_on_every_matrix(together, monkeypatch):
    """Three wide matrices go one by one, two and one, or all at once."""
    monkeypatch.setitem(muon.STACK_BYTES, "cpu", together)
    torch.manual_seed(0)
    matrices, experts = [torch.randn(*s) for s in ((6, 10), (10, 6), (6, 10), (6, 10))], torch.randn(3, 5, 8)
    ours = [torch.nn.Parameter(x.clone()) for x in (*matrices, experts)]
    theirs = [torch.nn.Parameter(x.clone()) for x in (*matrices, *experts)]
    one = Muon(ours, 0.01, momentum=0.9, weight_decay=0.1)
    two = torch.optim.Muon(theirs, lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p in ours:
            p.grad = torch.randn(p.shape)
        for q, g in zip(theirs, (*(p.grad for p in ours[:-1]), *ours[-1].grad), strict=True):
            q.grad = g.clone()
        one.step()
        two.step()
    found = [*ours[:-1], *ours[-1]]
    for a, b in zip(found, theirs, strict=True):
        # BF16 products may round in another order in a batch; an update is 0.01 x 0.2 x sqrt(10), its entries below 1.
        torch.testing.assert_close(a, b, atol=3 * 0.01 * 0.2 * 10**0.5 * 2**-7, rtol=0)


def test_muon_moves_singular_values_near_one():
    x = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalised(x, torch.float64))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_muon_leaves_embeddings_router_and_vectors_to_adamw():
    names = {name for name, p in hybrid().named_parameters() if in_muon(name, p)}
    assert "model.layers.1.mlp.experts.gate_proj" in names and "model.layers.0.attention.query_key_value.weight" in names
    assert not [n for n in names if "embeddings" in n or "lm_head" in n or "norm" in n or n.endswith("mlp.gate.weight")]


def test_schedules():
    c = TrainConfig(steps=20, warmup_steps=4, lr=1.0, schedule="wsd", decay_steps=5, min_lr_ratio=0.0)
    rates = [learning_rate(s, c) for s in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:15] == [1.0] * 11
    assert rates[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    constant = TrainConfig(steps=20, warmup_steps=4, lr=1.0)
    assert {learning_rate(s, constant) for s in range(4, 20)} == {1.0}


def test_batch_ramp_is_whole_parts_and_counts_tokens():
    ramp = {"start": 8, "tokens": 30_000, "stairs": 3}
    c = TrainConfig(tokens=100_000, batch_size=32, accumulation=8, sequence_length=64, ramp=ramp)
    assert [rows for _, rows in c.stairs] == [8, 16, 24]
    steps = [stop - start for start, stop in zip((0, *(s for s, _ in c.stairs)), (s for s, _ in c.stairs), strict=False)]
    for (_, rows), count in zip(c.stairs, steps, strict=True):
        assert 10_000 <= rows * 64 * count < 10_000 + rows * 64
    rows = [next((rows for stop, rows in c.stairs if step < stop), 32) for step in range(c.total_steps)]
    total = sum(rows) * 64
    assert 100_000 <= total < 100_000 + 32 * 64 and c.total_tokens == total
    assert rows[c.stairs[-1][0]] == 32
    one = TrainConfig(tokens=600, batch_size=32, accumulation=8, sequence_length=64, ramp=ramp)
    assert one.total_steps == 2


def test_parts_of_a_batch_may_change_on_resume_unless_a_ramp_goes_by_them():
    even = TrainConfig(steps=9, batch_size=32, accumulation=8)
    assert even.differences(even.model_dump(mode="json") | {"accumulation": 4}) == {}
    growing = even.model_copy(update={"ramp": BatchRamp(start=4, tokens=10**5, stairs=3)})
    assert growing.differences(growing.model_dump(mode="json") | {"accumulation": 4}) == {"accumulation": (8, 4)}
    assert set(even.differences(growing.model_dump(mode="json"))) == {"ramp"}


RARE = 60


class Poisoned(Ramped):
    """Some batches have a token whose embedding is not finite."""

    def __init__(self, *, bad):
        super().__init__([[t % RARE for t in text] for text in documents()], length=24, rows=2)
        self.bad = bad

    def batch(self, step):
        batch = super().batch(step)
        if step in self.bad:
            batch.ids[0, 0] = RARE
        return batch


def poisoned_model():
    model = hybrid()
    with torch.no_grad():
        model.model.word_embeddings.weight[RARE] = float("nan")
    return model


def test_bad_steps_are_left_out_and_the_run_resumes_alike(tmp_path):
    config = MIXED(steps=8, batch_size=2, sequence_length=24, max_skips=2)
    source = Poisoned(bad={2, 3, 6})
    model = run(tmp_path / "a", config, source, model=poisoned_model())
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"] - 1 for r in rows if r.get("skipped")} == source.bad
    assert rows[2]["loss"] is None and rows[2]["tokens"] == 3 * 48
    evidence = json.loads((tmp_path / "a" / "evidence" / "step_3.json").read_text())
    assert evidence["batch"] == 2 and evidence["input_ids"] == source.batch(2).ids.tolist()
    assert set(evidence["gradient_norms"]) == {n for n, _ in model.named_parameters()}
    assert model.model.layers[0].attention.dense.weight.isfinite().all()
    # Stopped behind every step, the same steps are left out and the weights are the same.
    other = None
    for i in range(8):
        stopping = config.model_copy(update={"max_seconds": 1e-9})
        # The clock counts the time of earlier parts: only the first part may look at it.
        other = run(tmp_path / "b", stopping if i == 0 else config, source, model=poisoned_model(), resume=i > 0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.nan_to_num(), q.nan_to_num())


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    config = MIXED(steps=9, batch_size=2, sequence_length=24, max_skips=2)
    with pytest.raises(Failure, match="at step 6, after 2 that were left out"):
        run(tmp_path, config, Poisoned(bad={3, 4, 5}), model=poisoned_model())
    assert sorted(p.name for p in (tmp_path / "evidence").iterdir()) == ["step_4.json", "step_5.json", "step_6.json"]


def test_leaps_are_judged_by_recent_medians(tmp_path):
    guard = Guard(tmp_path, MIXED(steps=1, spike_norm=4.0, spike_loss=1.0))
    for i in range(15):
        guard.good(3.0 - 0.01 * i, 1.0 + 0.01 * i)
        assert guard.verdict(99.0, 99.0) is None  # too few to know what is usual
    guard.good(2.85, 1.15)
    # Medians of 16: loss 2.925, norm 1.075.
    assert guard.verdict(3.92, 4.29) is None
    assert "gradient norm" in guard.verdict(3.0, 4.31)
    assert "loss" in guard.verdict(3.94, 1.0)
    again = Guard(tmp_path, guard.config)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again.verdict(3.94, 1.0) == guard.verdict(3.94, 1.0)
    assert Guard(tmp_path, MIXED(steps=1)).verdict(1e9, 1e9) is None


def test_checkpoints_are_pruned_and_a_damaged_one_is_passed_over(tmp_path):
    source = Ramped(documents(), length=24, rows=2)
    config = MIXED(steps=11, batch_size=2, sequence_length=24, checkpoint_steps=1, keep_last=2, keep_every=4)
    straight = run(tmp_path, config, source)
    assert list(checkpoints(tmp_path)) == [4, 8, 10, 11]
    weights = tmp_path / "checkpoints" / "step_11" / "optimizer.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    (tmp_path / "checkpoints" / "step_10" / "manifest.json").unlink()
    again = run(tmp_path, config, source, resume=True)
    for p, q in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == list(range(1, 12))


@pytest.mark.parametrize("clock", [None, 60.0])
@pytest.mark.parametrize("every", [None, 1, 2, 3])
def test_as_many_checkpoints_are_counted_as_pruning_leaves(tmp_path, clock, every):
    for steps, total, last in itertools.product((1, 2, 3, None), range(1, 14), (1, 2, 3, 5, 20)):
        kept_apart = None if every is None or steps is None else every * steps
        settings = {"checkpoint_steps": steps, "checkpoint_seconds": clock, "keep_last": last, "keep_every": kept_apart}
        folder = tmp_path / f"{steps} {total} {last}"
        saver = checkpoint.Saver(folder, Ranks(Parallel(torch.nn.Linear(1, 1), None, {})), keep_last=last, keep_every=kept_apart)
        for step in range(1, total + 1):
            if step == total or clock is not None or (steps and step % steps == 0):
                (folder / "checkpoints" / f"step_{step}").mkdir(parents=True)
                (folder / "checkpoints" / f"step_{step}" / "manifest.json").touch()
                saver._prune(step)
        assert len(checkpoints(folder)) == most_kept(MIXED(steps=total, **settings)), settings


def test_what_has_no_manifest_is_no_checkpoint(tmp_path):
    source = Ramped(documents(), length=24, rows=2)
    config = MIXED(steps=4, batch_size=2, sequence_length=24, checkpoint_steps=1, keep_last=2)
    run(tmp_path, config, source)
    folder = tmp_path / "checkpoints"
    (folder / "step_1").mkdir()  # as a removal that was killed leaves it
    (folder / "step_1" / "model.safetensors").touch()
    (folder / "step_99").mkdir()
    (folder / "step_98").touch()
    (folder / "step_5").touch()
    assert list(checkpoints(tmp_path)) == [3, 4] and checkpoint.latest_checkpoint(tmp_path) == folder / "step_4"
    assert list(chosen_checkpoints(tmp_path, last=2)) == [3, 4]
    told = []
    assert checkpoint.whole_checkpoint(tmp_path, told.append) == folder / "step_4"
    assert [text.split(": ", 1)[1] for text in told] == [
        f"step_{n}: it has no manifest.json, which is written last" for n in (99, 98, 5)
    ]
    assert sorted(p.name for p in folder.glob("damaged_*")) == ["damaged_step_5", "damaged_step_98", "damaged_step_99"]
    run(tmp_path, config.model_copy(update={"steps": 6}), source, resume=True)
    assert list(checkpoints(tmp_path)) == [5, 6] and not (folder / "step_1").exists()


@pytest.mark.parametrize("wrong", ["", "[]", "{}", "nothing"])
def test_what_is_damaged_is_put_aside_and_the_run_can_be_merged(tmp_path, wrong):
    source = Ramped(documents(), length=24, rows=2)
    config = MIXED(batch_size=2, sequence_length=24, checkpoint_steps=2, keep_last=4, steps=5)
    run(tmp_path, config, source)
    newest = tmp_path / "checkpoints" / "step_5"
    if wrong == "nothing":
        (newest / "state.json").unlink()
    else:
        (newest / "manifest.json").write_text(wrong)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[1:3] = ["\0\0\0", '{"step": 3, "lo']  # as a machine that lost power may leave them
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run(tmp_path, config.model_copy(update={"steps": 6}), source, resume=True)
    assert list(checkpoints(tmp_path)) == [2, 4, 6] and (newest.parent / "damaged_step_5").is_dir()
    assert list(chosen_checkpoints(tmp_path, last=3)) == [2, 4, 6]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 4, 5, 6]


def test_a_longer_run_goes_on_where_the_rate_is_constant(tmp_path):
    source = Ramped(documents(), length=24, rows=2)
    base = {"batch_size": 2, "sequence_length": 24, "optimizer": "muon"}
    run(tmp_path / "a", MIXED(steps=3, **base), source)
    longer = run(tmp_path / "a", MIXED(steps=5, **base), source, resume=True)
    straight = run(tmp_path / "b", MIXED(steps=5, **base), source)
    for p, q in zip(longer.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)
    run(tmp_path / "c", MIXED(steps=3, schedule="cosine", **base), source)
    with pytest.raises(UserError, match="where: +steps"):
        run(tmp_path / "c", MIXED(steps=5, schedule="cosine", **base), source, resume=True)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, checkpoint.PAGE_LOCKING),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, f"expandable_segments:True,{checkpoint.PAGE_LOCKING}"),
        ({"PYTORCH_ALLOC_CONF": "pinned_use_background_threads:True"}, None),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync", "PYTORCH_CUDA_ALLOC_CONF": ""}, None),
    ],
)
def test_what_a_user_says_of_allocators_is_kept(said, told, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    heard = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", heard.append)
    checkpoint.lock_pages_by_threads()
    assert heard == ([] if told is None else [told])


def test_lines_that_a_disk_has_lost_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\xff\x00\xfe\n{"step": 2, "loss": 1.5}\n' + bytes(range(128, 256)))
    log = MetricsLog(path, step=2)
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2] and log.last["loss"] == 1.5
