"""Trackers of other makers, all through three calls; none is needed: `metrics.jsonl` is always there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from openling.errors import UserError, nearest


class Tracker(Protocol):
    """What the loop tells of every step."""

    def log(self, row: dict[str, Any]) -> None:
        """A step's metrics."""
        ...

    def finish(self) -> None:
        """The run has ended, or stopped."""
        ...


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row, counters by source among them as source/NAME."""
    flat = row | {f"source/{name}": value for name, value in (row.get("tokens_by_source") or {}).items()}
    return {k: v for k, v in flat.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


class _Tensorboard:
    def __init__(self, run: Path, name: str, config: dict[str, Any]) -> None:
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(str(run / "tensorboard"))
        self._writer.add_text("config", f"```\n{config}\n```")

    def log(self, row: dict[str, Any]) -> None:
        for key, value in numbers(row).items():
            self._writer.add_scalar(key, value, row["step"])

    def finish(self) -> None:
        self._writer.close()


class _Runs:
    """trackio and wandb, which speak alike."""

    def __init__(self, package: str, run: Path, name: str, config: dict[str, Any]) -> None:
        self._module: Any = import_module(package)
        # A run that resumes goes on under its name (trackio) or under the id of its folder (wandb).
        folder = sha256(str(run.absolute()).encode()).hexdigest()[:12]
        where = {"dir": str(run), "id": folder} if package == "wandb" else {}
        self._module.init(project="openling", name=name, config=config, resume="allow", **where)

    def log(self, row: dict[str, Any]) -> None:
        values = numbers(row)
        self._module.log(values, step=values.pop("step"))

    def finish(self) -> None:
        self._module.finish()


KNOWN: dict[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "tensorboard": _Tensorboard,
    "trackio": lambda run, name, config: _Runs("trackio", run, name, config),
    "wandb": lambda run, name, config: _Runs("wandb", run, name, config),
}


def check_trackers(names: Sequence[str]) -> None:
    """A `UserError` for a tracker that is unknown or not installed; none is imported."""
    for wanted in names:
        if wanted not in KNOWN:
            close = nearest(wanted, KNOWN)
            raise UserError("there is no such tracker", value=wanted, expected=", ".join(KNOWN), nearest=close)
        found = find_spec(wanted)
        if found is None or found.origin is None:  # a plain folder of that name, as wandb writes one, has no origin
            raise UserError("this tracker is not installed", where="trackers", value=wanted, next=f"pip install {wanted}")


def open_trackers(names: Sequence[str], run: Path, name: str, config: dict[str, Any]) -> list[Tracker]:
    """The trackers of these names; a `UserError` for an unknown or missing one."""
    check_trackers(names)
    return [KNOWN[wanted](run, name, config) for wanted in names]
