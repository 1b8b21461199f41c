"""Trackers of other makers, offline: tensorboard always, the others where they are installed; what is said of one that is not."""

import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_stages import go, recipe

from openling.cli import main
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
    log_three_steps("tensorboard", tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {e.step: e.value for e in found.Scalars("loss")} == pytest.approx({1: 2.5, 2: 1.25, 3: 2.5 / 3})


def test_a_recipe_s_tracker_has_what_the_log_has(tmp_path: Path) -> None:
    go(tmp_path, tmp_path / "run", changes=[("trackers", '["tensorboard"]')])
    for stage in ("short", "long"):
        folder = tmp_path / "run" / "stages" / stage
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found = EventAccumulator(str(folder / "tensorboard")).Reload()
        for name in ("loss", "grad_norm", "lr", "tokens", "source/story"):
            assert [e.step for e in found.Scalars(name)] == [1, 2, 3, 4, 5, 6]
            assert [e.value for e in found.Scalars(name)] == pytest.approx([numbers(row)[name] for row in rows])


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_missing_tracker_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], folder: bool
) -> None:
    """Before anything is built or written. folder: one that an earlier run of wandb left is no installed wandb."""
    recipe(tmp_path)
    if folder:
        (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("openling.train.trackers.find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    words = ["train", str(tmp_path / "small.toml"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*words, "--set", 'trackers=["wandb"]', *more]) == 2
    told = capsys.readouterr().err
    assert "not installed" in told and "pip install wandb" in told
    assert not (tmp_path / "run").exists()


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
