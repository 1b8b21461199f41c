"""Checkpoints of a run: written in the background, whole or not at all, pruned; the folder guarded against a second writer.

`run/train.json` says what the run is; `run/checkpoints/step_N` holds `model.safetensors` (trained parameters and router biases,
as they train: the master weights), `optimizer.safetensors` (optimiser state, random generators), `state.json` (step, tokens,
fingerprint of the data, what judges steps) and `manifest.json` with size and SHA-256 of each, written last. A folder whose files
are not what its manifest says counts as none, and the one before it is taken.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from openling.errors import UserError
from openling.train.optim import Optimizers
from openling.weights.io import raw_bytes, tensors_header, write_error
from openling.weights.whole import write_all, write_json

__all__ = ["Saver", "checkpoints", "latest_checkpoint", "load_checkpoint", "sole_writer", "write_json"]
HASHED_AT_ONCE = 1 << 24


def checkpoints(run: Path) -> dict[int, Path]:
    """Checkpoint folders by step, in order. A folder of that name was written whole."""
    found = {int(m[1]): p for p in (run / "checkpoints").glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))}
    return dict(sorted(found.items()))


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint folder with the highest step, or None."""
    found = checkpoints(run)
    return found[max(found)] if found else None


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


class Saver:
    """Writes checkpoints of one run in a thread. `save` returns when everything is copied to memory; one is written at a time."""

    def __init__(self, run: Path, *, keep_last: int = 1, keep_every: int | None = None) -> None:
        self.folder, self.keep_last, self.keep_every = run / "checkpoints", keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, trained: dict[str, Tensor], optimizers: Optimizers, state: dict[str, Any]) -> None:
        """Begin `step_N`; an error of the one before is raised here."""
        self.wait()
        held = optimizers.tensors() | rng_tensors()
        files = {"model.safetensors": _copied(trained), "optimizer.safetensors": _copied(held)}
        self._thread = threading.Thread(target=self._run, args=(files, state), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        try:
            self._write(files, state)
            self._prune(state["step"])
        except BaseException as error:  # raised by the next `save` or `wait`
            self._error = error

    def _write(self, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        final, draft = self.folder / f"step_{state['step']}", self.folder / ".draft"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            write_json(draft / "state.json", state)
            manifest = {name: _write_tensors(draft / name, tensors) for name, tensors in files.items()}
            text = (draft / "state.json").read_bytes()
            manifest["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
            write_json(draft / "manifest.json", manifest)
            sync(draft)
            if final.exists():  # found damaged when the run resumed
                shutil.rmtree(final)
            draft.rename(final)
            sync(self.folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            resume = "free some space, then the same command with --resume"
            raise write_error(error, final, kept="the previous checkpoint is kept", resume=resume) from error

    def _prune(self, step: int) -> None:
        """Keep the last few and every so many steps; the one just written always stays."""
        found = checkpoints(self.folder.parent)
        kept = set(sorted(n for n in found if n <= step)[-self.keep_last :]) | {step}
        if self.keep_every is not None:
            kept |= {n for n in found if n % self.keep_every == 0}
        for n in found.keys() - kept:
            shutil.rmtree(found[n], ignore_errors=True)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: training goes on over the originals."""
    copies = {name: t.detach().to("cpu", copy=True, non_blocking=True) for name, t in tensors.items()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A safetensors file on the disk, and its line of the manifest. Neither hashing nor writing holds up other threads."""
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for piece in (memoryview(tensors_header(tensors)), *(raw_bytes(t) for t in tensors.values())):
            for start in range(0, len(piece), HASHED_AT_ONCE):
                block = piece[start : start + HASHED_AT_ONCE]
                digest.update(block)
                write_all(handle, block)
            size += len(piece)
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"bytes": size, "sha256": digest.hexdigest()}


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None; every byte is read."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name, line in manifest.items():
            path = checkpoint / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != line["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {line['bytes']}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != line["sha256"]:
                    return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def whole_checkpoint(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, damaged ones told; None where there are none, a `UserError` where none is whole."""
    told: list[str] = []
    for path in reversed(checkpoints(run).values()):
        wrong = damage(path)
        if wrong is None:
            return path
        told.append(f"{path.name}: {wrong}")
        say(f"this checkpoint is damaged and left out: {told[-1]}")
    if told:
        raise UserError(
            "the checkpoint is damaged, and there is no other", where=run / "checkpoints", value="; ".join(told),
            next=f"remove {run} and train again",
        )  # fmt: skip
    return None


def load_checkpoint(checkpoint: Path, trained: dict[str, Tensor], optimizers: Optimizers) -> dict[str, Any]:
    """Put trained tensors, optimiser state and random generators back in place; returns `state.json`."""
    weights = load_file(checkpoint / "model.safetensors")
    tensors = load_file(checkpoint / "optimizer.safetensors")
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    for name, tensor in trained.items():
        if name not in weights or weights[name].shape != tensor.shape:
            found = list(weights[name].shape) if name in weights else "missing"
            raise UserError("the checkpoint is of another model", where=name, value=found, expected=list(tensor.shape))
        with torch.no_grad():
            tensor.copy_(weights[name])
    optimizers.load(tensors)
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return state


def load_start(checkpoint: Path, model: nn.Module, optimizers: Optimizers | None = None) -> None:
    """Put the weights of an earlier stage's checkpoint into a model, and what it has of optimiser state."""
    weights = load_file(checkpoint / "model.safetensors")
    mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in weights.items():
        if name not in mine or mine[name].shape != value.shape:
            found = list(mine[name].shape) if name in mine else "no such tensor"
            raise UserError("the earlier stage trained another model", where=name, value=found, expected=list(value.shape))
        with torch.no_grad():
            mine[name].copy_(value)
    if optimizers is not None:
        optimizers.load(load_file(checkpoint / "optimizer.safetensors"))


def trained_tensors(model: nn.Module, chosen: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """What training changes: the chosen parameters, and the router's biases, which are no parameters."""
    return {**chosen, **{name: b for name, b in model.named_buffers() if name.endswith("expert_bias")}}


def rng_tensors() -> dict[str, Tensor]:
    """States of the random generators."""
    found = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["rng/cuda"] = torch.cuda.get_rng_state()
    return found


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
