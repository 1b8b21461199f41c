"""The loop on 2 and 4 processes (gloo): every axis trains as one rank does, stops, resumes on any mesh, and all agree.

All processes of a world are started once and go through every case; those of `MORE`, which differ from them in nothing that
`tests/parallel` does not hold too, run with OPENLING_ALL_MESHES=1. FP64: sums of a few hundred terms in another order differ by
1e-13 of their size; what AdamW makes of tiny gradients adds to it, hence 1e-9 for weights that move by 1e-3 a step.
"""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packed_training import MIXED, documents, hybrid

from openling.data.batches import MemoryBatches
from openling.errors import UserError
from openling.parallel.apply import apply
from openling.parallel.mesh import Axes, build
from openling.train.checkpoint import latest_checkpoint
from openling.train.loop import train
from openling.train.ranks import Ranks
from openling.train.reading import open_checkpoint

STEPS = 3
SHAPE = {"vocab_size": 62, "num_attention_heads": 4, "num_key_value_heads": 4, "group_norm_size": 2}
# Name: axes and what differs from `settings`; what is left of the world is data_shard.
CASES = {
    2: {
        "shard": (Axes(), {}),
        "context": (Axes(context=2), {}),
        "pipeline": (Axes(pipeline=2), {"mtp_steps": 3, "mtp_detach": "later"}),
        "taught": (Axes(tensor=2), {"kl": 0.5, "align": 0.5, "mtp_steps": 3, "mtp_detach": "later"}),
        "muon": (Axes(expert=2), {"optimizer": "muon"}),
        "reduced by part": (Axes(), {"gather": "layer"}),
        "gathered once": (Axes(expert=2), {"gather": "step", "accumulation": 4}),
    },
    4: {
        "context x expert": (Axes(context=2, expert=4), {"kl": 0.5, "align": 0.5}),
        "tensor x shard": (Axes(tensor=2), {"optimizer": "muon"}),
        "pipeline x expert": (Axes(pipeline=2, expert=2, context=2), {}),
    },
}
MORE = {
    2: {"expert": (Axes(expert=2), {}), "tensor": (Axes(tensor=2), {})},
    4: {
        "replicate x shard x expert": (Axes(data_replicate=2, expert=2), {}),
        "tensor x context": (Axes(tensor=2, context=2), {}),
        "pipeline x shard": (Axes(pipeline=2), {"optimizer": "muon"}),
    },
}
if os.environ.get("OPENLING_ALL_MESHES"):
    CASES = {world: cases | MORE[world] for world, cases in CASES.items()}
TOLD = ("loss", "ce", "kl", "align", "z", "mtp", "grad_norm", "imbalance", "tokens", "tokens_by_source")


def settings(**changes):
    return MIXED(**{"steps": STEPS, "batch_size": 8, "accumulation": 2, "sequence_length": 24} | changes)


def model(seed=0):
    return hybrid(seed, **SHAPE).double()


def go(run, axes=None, source=None, start=None, nan_word=None, gather="accumulate", **changes):
    """Train on a mesh, or alone; returns the result and the ranks. nan_word: whose embedding is not finite."""
    config = settings(**changes)
    student, teacher = model(), model(seed=1) if config.kl else None
    if nan_word is not None:
        student.model.word_embeddings.weight.data[nan_word] = float("nan")
    mesh = None if axes is None else build(axes, student.config, "cpu")
    ranks = Ranks(apply(student, mesh, gather=gather))
    if teacher is not None:
        apply(teacher, mesh)
    rank, world = (0, 1) if mesh is None else (mesh.data_rank, mesh.data_ranks)
    batches = (source or MemoryBatches)(documents(), length=24, rows=8, rank=rank, world=world)
    resume = (run / "train.json").exists()
    options = {"parameters": [""], "run": run, "resume": resume, "progress": False, "start": start}
    return train(student, config, batches, teacher=teacher, ranks=ranks, **options), ranks


def rows(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: row.get(name) for name in TOLD} for row in map(json.loads, lines)]


def tensors(run):
    """All that the newest checkpoint holds, random generators excepted."""
    found = open_checkpoint(latest_checkpoint(run))
    return {name: found.whole(name) for name in found.shapes if not name.startswith("rng/")}


def assert_close(run, expected):
    for row, wanted in zip(rows(run), rows(expected), strict=True):
        for name in TOLD:
            value = wanted[name]
            assert row[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), name
    found, wanted = tensors(run), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_bits(run, expected):
    assert rows(run) == rows(expected)
    found, wanted = tensors(run), tensors(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


class Interrupting(MemoryBatches):
    """Signals the last rank while it reads ahead."""

    def batch(self, step):
        if step == 3 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(step)


class Poisoned(MemoryBatches):
    """Its second batch has, on the last rank, a word that no other has: its embedding is not finite."""

    def batch(self, step):
        found = super().batch(step)
        if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            found.ids[0, 3] = 61
        return found


class Filling(MemoryBatches):
    """From its twentieth batch on the last rank's files may not grow, once the first checkpoint is there."""

    run = None

    def batch(self, step):
        if step == 19 and dist.get_rank() == dist.get_world_size() - 1:
            while not (self.run / "checkpoints" / "step_10").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return super().batch(step)


def full(folder):
    """One rank's disk is full: all say so before the next checkpoint is due, and go on from the one before as if nothing were."""
    often, Filling.run = {"steps": 30, "checkpoint_steps": 10}, folder / "full"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match=r"no space left while writing; the previous checkpoint is kept[\s\S]*step_20\n"):
        go(folder / "full", Axes(), Filling, **often)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 20 <= len(rows(folder / "full")) < 30
    assert latest_checkpoint(folder / "full").name == "step_10"
    go(folder / "full", Axes(), **often)
    go(folder / "never full", Axes(), **often)


def skip(folder):
    """What one rank cannot use is left out by all, evidence kept by each."""
    _, ranks = go(folder / "poisoned", Axes(), Poisoned, nan_word=61, max_skips=1)
    ranks.told(lambda: None)
    written = [json.loads(line) for line in (folder / "poisoned" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped") for row in written] == [None, "the loss or a gradient is not finite", None]
    assert sorted(p.name for p in (folder / "poisoned" / "evidence").iterdir()) == ["step_2.json", "step_2_rank_1.json"]


def agree(folder):
    """A signal to one rank stops all at one step, which is in a checkpoint."""
    result, ranks = go(folder / "signal", Axes(), Interrupting, steps=200)
    steps = [None] * ranks.count
    dist.all_gather_object(steps, (result.stopped, result.signal, result.steps))
    assert len(set(steps)) == 1 and steps[0][:2] == ("signal", signal.SIGTERM)
    assert latest_checkpoint(folder / "signal").name == f"step_{result.steps}"


def resume(folder):
    """Stopped after a step by the clock, gone on with on the same mesh: the same bits; on another: the same training."""
    result, ranks = go(folder / "same", Axes(), max_seconds=1e-9)
    assert (result.stopped, result.steps) == ("time", 1)
    for name in ("other", "alone", "stages"):
        ranks.told(lambda name=name: shutil.copytree(folder / "same", folder / name) and None)
    go(folder / "same", Axes())
    go(folder / "other", Axes(tensor=2))
    go(folder / "stages", Axes(pipeline=2))
    go(folder / "next", Axes(pipeline=2), start=latest_checkpoint(folder / "shard"))


def refusals(folder):
    """Every rank raises what the main rank found."""
    with pytest.raises(UserError, match="another configuration"):
        go(folder / "shard", Axes(), lr=1.0)
    with pytest.raises(UserError, match="cannot be shared evenly"):
        go(folder / "new", Axes(), accumulation=8)
    with pytest.raises(UserError, match="not cut into pipeline stages"):
        go(folder / "new", Axes(pipeline=2), kl=0.5)
    assert not (folder / "new").exists()


def gathers(folder):
    """How often weights travel: twice a part, but once a step where they are kept."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before torch 2.13
    count, plain = Counter(), getattr(dist, name)
    for gather in ("accumulate", "step"):

        def counting(*args, gather=gather, **kwargs):
            count[gather] += 1
            return plain(*args, **kwargs)

        setattr(dist, name, counting)
        try:
            go(folder / f"counted {gather}", Axes(), gather=gather, accumulation=4)
        finally:
            setattr(dist, name, plain)
    assert count["step"] > 0 and count["accumulate"] > 4 * count["step"], count


def everything(rank, world, folder):
    """What every process runs."""
    torch.set_num_threads(1)
    folder = Path(folder)
    rendezvous, limit = f"file://{folder}/rendezvous", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=limit)
    for name, (axes, changes) in CASES[world].items():
        go(folder / name, axes, **changes)
    if world == 2:
        gathers(folder)
        skip(folder)
        agree(folder)
        resume(folder)
        full(folder)
        refusals(folder)
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("world", [2, 4])
def test_every_mesh_trains_as_one_rank(world, tmp_path):
    multiprocessing.set_forkserver_preload(["openling.train.loop", "openling.parallel.pieces", "torch._dynamo"])
    mp.start_processes(everything, args=(world, str(tmp_path)), nprocs=world, start_method="forkserver")
    torch.set_num_threads(1)
    alone = {}
    for name, (_, changes) in CASES[world].items():
        key = json.dumps(changes)
        if key not in alone:
            alone[key] = tmp_path / f"one {len(alone)}"
            go(alone[key], **changes)
        assert_close(tmp_path / name, alone[key])
    if world == 2:
        assert_same_bits(tmp_path / "same", tmp_path / "shard")
        assert_same_bits(tmp_path / "full", tmp_path / "never full")
        go(tmp_path / "alone")
        for name in ("other", "alone", "stages"):
            assert_close(tmp_path / name, alone["{}"])
        go(tmp_path / "next alone", start=latest_checkpoint(tmp_path / "shard"))
        assert_close(tmp_path / "next", tmp_path / "next alone")
