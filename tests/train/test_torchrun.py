"""`openling train` under torchrun: ranks that are killed, an error of one rank, a signal."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from test_stages import KILLS, RECIPE, assert_same_run, kill_somewhere, ready_processes, recipe, rows

from openling.config.recipe import read_recipe
from openling.parallel.world import ending_together, join
from openling.train.checkpoint import damage, latest_checkpoint
from openling.train.stages import Pipeline

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STEPS = 24
FAILING = """
import torch, torch.distributed as dist
from openling.errors import UserError
from openling.parallel.world import ending_together, join
world = join(torch.device("cpu"))
with ending_together(world):
    if world.rank == 1:
        raise UserError("one rank is wrong")
    dist.all_reduce(torch.zeros(1))
"""


def started(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*TORCHRUN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def workers(process):
    """The ranks, in order."""
    found = [p for p in psutil.Process(process.pid).children() if "RANK" in p.environ()]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


def wait_for_a_checkpoint(folder, process):
    while latest_checkpoint(folder) is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_one_rank_s_error_is_told_once_and_ends_all(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    process = started(str(script))
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0
    assert told.count("one rank is wrong") == 1 and "openling, rank 1: one rank is wrong" in told


def go(path, run, *, resume=False):
    torch.set_num_threads(1)
    Pipeline(read_recipe(path), run, device=torch.device("cpu"), progress=False).go(resume=resume)


def test_killed_stopped_and_resumed_on_other_meshes(tmp_path):
    """Killed on two ranks, gone on with on two until a signal, ended on one: the losses of a run that one rank made."""
    recipe(tmp_path)  # writes the text
    path, run = tmp_path / "one.toml", tmp_path / "run"
    path.write_text("[[stages]]".join(RECIPE.split("[[stages]]")[:2]).format(folder=tmp_path, steps=STEPS))
    stage = run / "stages" / "short"
    words = ["-m", "openling", "train", str(path), "--out", str(run), "--device", "cpu"]
    process = started(*words)
    wait_for_a_checkpoint(stage, process)
    workers(process)[1].kill()
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0
    assert told.count("another rank has died") == 1 and "with --resume" in told, told
    assert "openling/train" not in told  # no traceback of ours
    newest = latest_checkpoint(stage)
    assert damage(newest) is None
    process = started(*words, "--resume")
    while latest_checkpoint(stage) == newest:
        time.sleep(0.05)
    workers(process)[0].send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert told.count("stopped by a signal") == 1, told
    assert "continuing after step" in told
    assert int(latest_checkpoint(stage).name.removeprefix("step_")) < STEPS
    go(path, run, resume=True)
    go(path, tmp_path / "straight")
    found, wanted = rows(run, "short"), rows(tmp_path / "straight", "short")
    assert len(found) == len(wanted) == STEPS
    for row, expected in zip(found, wanted, strict=True):
        # FP32 sums in another order differ by 1e-6; AdamW's first steps have the size of the rate whatever the gradient is, so
        # gradients that are rounding alone move their weights by lr = 2e-3 either way.
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def _rank(number, port, path, run, resume):
    """What torchrun starts, in a process that has what it imports."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with ending_together(join(torch.device("cpu"))):
        go(path, run, resume=resume)


def two_ranks(path, run):
    """Started, to go on with what is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    resume = (run / "recipe.json").exists()
    ranks = [ready_processes().Process(target=_rank, args=(n, port, path, run, resume), daemon=True) for n in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def test_ranks_killed_at_random_end_with_the_same_weights(tmp_path):
    """One rank dies at any moment, the other goes on alone until torchrun would end it: nothing of that is seen afterwards."""
    recipe(tmp_path)  # writes the text
    path, run, rng = tmp_path / "two.toml", tmp_path / "killed", random.Random(2)
    path.write_text(RECIPE.replace("batch_size = 1", "batch_size = 2").format(folder=tmp_path, steps=4 * KILLS))
    for _ in range(KILLS):
        first, second = rng.sample(two_ranks(path, run), 2)
        kill_somewhere(first, run, rng)
        second.join(rng.uniform(0, 0.3))
        second.kill()
        second.join()
    for place in (run, tmp_path / "straight"):
        ranks = two_ranks(path, place)
        for rank in ranks:
            rank.join(120)
        assert [rank.exitcode for rank in ranks] == [0, 0]
    assert_same_run(run, tmp_path / "straight")
