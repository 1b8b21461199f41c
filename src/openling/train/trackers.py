"""Trackers of other makers, all through three calls; none is needed: `metrics.jsonl` is always there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib import import_module
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
        self._writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run / "tensorboard"))
        self._writer.add_text("config", f"```\n{config}\n```")

    def log(self, row: dict[str, Any]) -> None:
        for key, value in numbers(row).items():
            self._writer.add_scalar(key, value, row["step"])

    def finish(self) -> None:
        self._writer.close()


class _Runs:
    """trackio and wandb, which speak alike."""

    def __init__(self, package: str, run: Path, name: str, config: dict[str, Any]) -> None:
        self._module = _module(package, package)
        # A run that resumes goes on under its name (trackio) or under the id of its folder (wandb).
        folder = sha256(str(run.absolute()).encode()).hexdigest()[:12]
        where = {"dir": str(run), "id": folder} if package == "wandb" else {}
        self._module.init(project="openling", name=name, config=config, resume="allow", **where)

    def log(self, row: dict[str, Any]) -> None:
        values = numbers(row)
        self._module.log(values, step=values.pop("step"))

    def finish(self) -> None:
        self._module.finish()


def _module(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError("this tracker is not installed", value=package, next=f"pip install {package}") from error


KNOWN: dict[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "tensorboard": _Tensorboard,
    "trackio": lambda run, name, config: _Runs("trackio", run, name, config),
    "wandb": lambda run, name, config: _Runs("wandb", run, name, config),
}


def open_trackers(names: Sequence[str], run: Path, name: str, config: dict[str, Any]) -> list[Tracker]:
    """The trackers of these names; a `UserError` for an unknown or missing one."""
    for wanted in names:
        if wanted not in KNOWN:
            close = nearest(wanted, KNOWN)
            raise UserError("there is no such tracker", value=wanted, expected=", ".join(KNOWN), nearest=close)
    return [KNOWN[wanted](run, name, config) for wanted in names]
