"""A recipe whose stages have their own mesh, recomputing and gathering, on 2 processes (gloo): what it trains is one rank's.

FP32 as in `test_torchrun.py`, and the same tolerance for the same reason: AdamW's first steps have the size of the rate whatever
the gradient is, so gradients that are rounding alone move their weights by the rate either way.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_stages import RECIPE, recipe, rows

from openling.config.recipe import read_recipe
from openling.data.mixture import MixtureBatches
from openling.train.stages import Pipeline

LAST = '[[stages]]\nname = "last"\nsteps = 4\nmixture = {{ length = 32 }}\naccumulation = 2\n'
BATCHES = [("stages.long.batch_size", "2")]
OWN = [
    ("parallel.gather", "step"),
    ("stages.long.parallel", '{"rest": "context", "expert": 2, "recompute": "layer", "gather": "layer"}'),
    ("stages.last.parallel", '{"pipeline": 2, "recompute": "selective", "gather": "accumulate"}'),
]
OTHER = [("stages.long.parallel", '{"tensor": 2, "recompute": "selective"}'), ("stages.long.accumulation", "2")]


def go(folder, run, changes, *, resume=False):
    changed = read_recipe(folder / "three.toml", [*BATCHES, *changes])
    return Pipeline(changed, run, device=torch.device("cpu"), progress=False).go(resume=resume)


def stopping_in_the_second_stage():
    """Batches that signal this rank while it reads ahead, once."""
    plain = MixtureBatches.batch

    def batch(self, step):
        if self.config.row_length == 64 and step == 3:
            MixtureBatches.batch = plain
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, step)

    MixtureBatches.batch = batch


def everything(rank, world, folder):
    """What every process runs: a run to its end, and one that stops in its second stage and goes on, on another mesh too."""
    torch.set_num_threads(1)
    folder = Path(folder)
    rendezvous, limit = f"file://{folder}/rendezvous", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=limit)
    go(folder, folder / "own", OWN)
    if rank == 1:
        stopping_in_the_second_stage()
    outcome = go(folder, folder / "same", OWN)
    assert outcome.stopped.stopped == "signal" and [path.name for path in outcome.models] == ["short"]
    if rank == 0:
        shutil.copytree(folder / "same", folder / "other")
    dist.barrier()
    go(folder, folder / "same", OWN, resume=True)
    go(folder, folder / "other", [*OWN, *OTHER], resume=True)
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo")
def test_stages_on_their_own_meshes_train_as_one_rank(tmp_path):
    recipe(tmp_path)  # writes the text
    (tmp_path / "three.toml").write_text((RECIPE + LAST).format(folder=tmp_path, steps=6))
    multiprocessing.set_forkserver_preload(["openling.train.stages", "torch._dynamo"])
    mp.start_processes(everything, args=(2, str(tmp_path)), nprocs=2, start_method="forkserver")
    torch.set_num_threads(1)
    go(tmp_path, tmp_path / "alone", [])
    for stage in ("short", "long", "last"):
        wanted = rows(tmp_path / "alone", stage)
        for name in ("own", "same", "other"):
            found = rows(tmp_path / name, stage)
            assert [row["tokens"] for row in found] == [row["tokens"] for row in wanted], (name, stage)
            for row, expected in zip(found, wanted, strict=True):
                assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3), (name, stage, row["step"])
        # Stopped and gone on with on the same meshes: the same bits.
        assert rows(tmp_path / "same", stage) == rows(tmp_path / "own", stage)
    meshes = {s["name"]: s["parallel"] for s in json.loads((tmp_path / "other" / "recipe.json").read_text())["recipe"]["stages"]}
    assert meshes["short"] is None and meshes["long"]["tensor"] == 2 and meshes["last"]["pipeline"] == 2
