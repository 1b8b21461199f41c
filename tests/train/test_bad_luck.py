"""A disk that fills up and clocks that are wrong: one clear error, nothing half-written looks whole, the same weights after."""

import errno
import os
import resource
import shutil
import time
from itertools import count
from pathlib import Path

import pytest
from test_loop import assert_same_weights, metrics, run_training, tiny_config

from openling.errors import UserError
from openling.train.checkpoint import checkpoints, damage, latest_checkpoint


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happened to: its folder and model."""
    run = tmp_path_factory.mktemp("straight") / "run"
    return run, run_training(run, config())[0]


def config(**changes):
    return tiny_config(**{"steps": 6, "checkpoint_steps": 2, "keep_last": 9} | changes)


def ends_like(run, straight, changed=None):
    """Resumed, it has the losses and weights of the run that nothing happened to."""
    again, _ = run_training(run, changed or config(), resume=True)
    assert metrics(run) == metrics(straight[0])
    assert_same_weights(again, straight[1])


class Disk:
    """Notes what a run writes to its checkpoints behind the first, and has no more space from call number `full` on."""

    def __init__(self, monkeypatch, run, full=None):
        self.first, self.full, self.calls = run / "checkpoints" / "step_2", full, []
        self.begun = False
        for name in ("open", "write", "fsync", "mkdir", "rename"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name, call):
        def watched(target, *args, **kwargs):
            place = str(Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else target)
            reads = name == "open" and not args[0] & os.O_CREAT
            self.begun |= name == "mkdir" and self.first.exists()
            if self.begun and place.startswith(str(self.first.parent)) and not reads:
                self.calls.append((name, place))
                if self.full is not None and len(self.calls) > self.full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(target, *args, **kwargs)

        return watched


def test_a_disk_that_fills_anywhere_in_a_checkpoint(tmp_path, monkeypatch, straight):
    with monkeypatch.context() as patch:
        disk = Disk(patch, tmp_path / "watched")
        run_training(tmp_path / "watched", config())
    calls = disk.calls[: disk.calls.index(("rename", str(disk.first.parent / ".draft"))) + 2]
    different = [i for i, call in enumerate(calls) if call not in calls[:i]]
    assert {calls[i][0] for i in different} == {"open", "write", "fsync", "mkdir", "rename"} and len(different) > 12
    for number in [*different, different[-1] // 2]:  # each kind of call on each file, and one in the middle of a file
        run = tmp_path / str(number)
        with monkeypatch.context() as patch:
            Disk(patch, run, number)
            with pytest.raises(UserError) as caught:
                run_training(run, config())
        assert "no space left while writing; the previous checkpoint is kept" in caught.value.what
        assert caught.value.parts["where"] == run / "checkpoints" / "step_4" and "--resume" in caught.value.parts["next"]
        found = checkpoints(run)
        assert list(found) == ([2, 4] if calls[number] == ("fsync", str(disk.first.parent)) else [2])
        assert not any(map(damage, found.values()))
        assert sorted((run / "checkpoints").iterdir()) == sorted(found.values())
        ends_like(run, straight)


class Then:
    """A tracker that does something behind one step, in the main thread."""

    def __init__(self, step, act):
        self.step, self.act, self.last = step, act, 0

    def log(self, row):
        self.last = row["step"]
        if row["step"] == self.step:
            self.act()

    def finish(self):
        pass


@pytest.fixture
def short_files():
    """Limits this process to short files, as the system does it; afterwards files may grow again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_once(tmp_path, short_files):
    """Not when the next is due: what is trained until then would be lost too."""
    watching = Then(49, lambda: short_files(60_000))
    with pytest.raises(UserError, match=r"no space left while writing; the previous checkpoint is kept[\s\S]*step_50\n"):
        run_training(tmp_path, config(steps=1000, checkpoint_steps=50), trackers=[watching])
    assert 50 <= watching.last < 100 and not list((tmp_path / "checkpoints").iterdir())


def test_a_log_that_cannot_be_written(tmp_path, short_files, straight):
    def limit():
        end = time.monotonic() + 60
        while not checkpoints(tmp_path / "run"):  # that of step 3, written meanwhile
            assert time.monotonic() < end
            time.sleep(0.001)
        short_files((tmp_path / "run" / "metrics.jsonl").stat().st_size + 9)

    with pytest.raises(UserError, match=r"no space left while writing; the last checkpoint is kept[\s\S]*metrics.jsonl"):
        run_training(tmp_path / "run", config(checkpoint_steps=3), trackers=[Then(4, limit)])
    assert list(checkpoints(tmp_path / "run")) == [3]
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.count("\n") == 4 and not text.endswith("\n")  # a torn line, which resuming drops
    short_files(resource.RLIM_INFINITY)
    ends_like(tmp_path / "run", straight, config(checkpoint_steps=3))


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path, straight):
    """Whatever the files' times say: of a machine whose clock ran ahead, or behind."""
    run_training(tmp_path, config())
    shutil.rmtree(tmp_path / "checkpoints" / "step_6")
    for year, step in ((2100, 2), (1980, 4)):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        when = (year - 1970) * 365 * 86400
        for path in [*folder.iterdir(), folder]:
            os.utime(path, (when, when))
    assert latest_checkpoint(tmp_path).name == "step_4"
    run_training(tmp_path, config(keep_last=2), resume=True)
    assert list(checkpoints(tmp_path)) == [4, 6]  # of three, the one of the lowest step is gone
    assert metrics(tmp_path) == metrics(straight[0])


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_during_a_run(tmp_path, monkeypatch, straight, hours):
    """Saves by the clock and the time box go by one that nobody can set."""
    now, calls, seconds = time.time(), count(), {"checkpoint_seconds": 1000, "max_seconds": 1000}
    monkeypatch.setattr(time, "time", lambda: now + 3600 * hours * next(calls))
    _, result = run_training(tmp_path / "rarely", config(checkpoint_steps=None, **seconds))
    assert result.stopped == "finished" and result.seconds < 1000
    assert list(checkpoints(tmp_path / "rarely")) == [6] and metrics(tmp_path / "rarely") == metrics(straight[0])
    run_training(tmp_path / "often", config(checkpoint_steps=None, checkpoint_seconds=1e-9, steps=60))
    assert len(checkpoints(tmp_path / "often")) > 1
    _, result = run_training(tmp_path / "stopped", config(max_seconds=1e-9))
    assert result.stopped == "time"
