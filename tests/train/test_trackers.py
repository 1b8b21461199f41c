"""Trackers of other makers, each where it is installed, offline; what is said of one that is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openling.errors import UserError
from openling.train.trackers import numbers, open_trackers

ROW = {"step": 1, "loss": 2.5, "mfu": None, "skipped": "why", "tokens_by_source": {"web": 3}}


def log_three_steps(name: str, folder: Path) -> None:
    (tracker,) = open_trackers([name], folder, "run", {"lr": 1e-3})
    for step in (1, 2, 3):
        tracker.log(ROW | {"step": step, "loss": 2.5 / step})
    tracker.finish()


def test_only_numbers_are_told() -> None:
    assert numbers(ROW) == {"step": 1, "loss": 2.5, "source/web": 3}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_three_steps("tensorboard", tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {e.step: e.value for e in found.Scalars("loss")} == pytest.approx({1: 2.5, 2: 1.25, 3: 2.5 / 3})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_goes_on_under_its_name(name: str, tmp_path: Path) -> None:
    """In processes of their own: both read their settings when they are imported."""
    pytest.importorskip(name)
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_trackers as t, pathlib; "
    program += f"t.log_three_steps({name!r}, pathlib.Path({str(tmp_path)!r}))"
    settings = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path)}
    said = [
        subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert any(tmp_path.rglob("*.db" if name == "trackio" else "*.wandb"))
    assert name == "wandb" or "Resumed existing run" in said[1].stdout + said[1].stderr


def test_unknown_trackers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such tracker") as caught:
        open_trackers(["wandbb"], tmp_path, "run", {})
    assert caught.value.parts["nearest"] == "wandb"
