"""Checkpoints of a run: written whole or not at all, one kept, and the folder guarded against a second writer.

`run/train.json` says what the run is; `run/checkpoints/step_N` holds `model.safetensors` (the trained parameters),
`optimizer.safetensors` (AdamW state, random generators) and `state.json` (step, tokens, seconds, place in the data).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openling.errors import Failure, UserError


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint folder with the highest step, or None. A folder of that name is always whole."""
    steps = {int(m[1]): p for p in (run / "checkpoints").glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))}
    return steps[max(steps)] if steps else None


@contextmanager
def sole_writer(run: Path) -> Iterator[None]:
    """Make the run folder and hold it; a `UserError` when another process does. The hold ends with the process."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("w")
    except OSError as error:
        raise UserError(
            "the run folder cannot be written", where=run, value=error.strerror, expected="a writable folder"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError("another process is at work in this run folder", where=run, expected="one process") from error
        yield


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def save_checkpoint(
    run: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write `step_N` beside the previous checkpoint, then remove that one."""
    folder = run / "checkpoints"
    final, draft = folder / f"step_{state['step']}", folder / ".draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_file({name: p.detach() for name, p in parameters.items()}, draft / "model.safetensors")
        save_file(_optimizer_tensors(parameters, optimizer), draft / "optimizer.safetensors")
        write_json(draft / "state.json", state)
        for path in (*draft.iterdir(), draft):
            _sync(path)
        draft.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        if "No space left" in str(error):  # the safetensors writer wraps the OSError in its own
            what = "no space left for the checkpoint; the previous one is kept"
            raise UserError(what, where=final, next="free some space, then the same command with --resume") from error
        raise Failure("the checkpoint could not be written; the previous one is kept", where=final, value=error) from error
    for old in folder.glob("step_*"):
        if old != final:
            shutil.rmtree(old)
    return final


def load_checkpoint(checkpoint: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put parameters, optimiser state and random generators back in place; returns `state.json`."""
    try:
        weights = load_file(checkpoint / "model.safetensors")
        tensors = load_file(checkpoint / "optimizer.safetensors")
        state = json.loads((checkpoint / "state.json").read_text())
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            "the checkpoint is damaged", where=checkpoint, value=error, next=f"remove {checkpoint.parent.parent} and train again"
        ) from error
    for name, parameter in parameters.items():
        if name not in weights or weights[name].shape != parameter.shape:
            found = list(weights[name].shape) if name in weights else "missing"
            raise UserError("the checkpoint is of another model", where=name, value=found, expected=list(parameter.shape))
        with torch.no_grad():
            parameter.copy_(weights[name])
        slots = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors}
        if slots:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in slots.items()}
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return state


def _optimizer_tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"{key}/{name}": value for name, p in parameters.items() for key, value in optimizer.state.get(p, {}).items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
