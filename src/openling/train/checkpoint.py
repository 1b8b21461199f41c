"""Checkpoints of a run: written in the background, whole or not at all, pruned; the folder guarded against a second writer.

`run/train.json` says what the run is; `run/checkpoints/step_N` holds trained parameters and router biases as they train (the
master weights), optimiser state and random generators: one rank writes `model.safetensors` and `optimizer.safetensors`, several
each a `.distcp` file of a DCP folder. Beside them `state.json` (step, tokens, fingerprint of the data, what judges steps) and,
written last, `manifest.json` with size and SHA-256 of each file. A folder whose files are not what its manifest says counts as
none, and the one before it is taken. `reading` opens either form on any mesh.
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
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from openling.errors import UserError
from openling.model.ling import Ling
from openling.parallel.apply import Parallel
from openling.parallel.pieces import pieces
from openling.parallel.pieces import save as save_pieces
from openling.parallel.pipeline import is_elsewhere
from openling.train.optim import Optimizers
from openling.train.ranks import Ranks, told
from openling.train.reading import METADATA, open_checkpoint
from openling.weights.io import raw_bytes, tensors_header, write_error
from openling.weights.whole import write_all, write_json

__all__ = ["Saver", "checkpoints", "latest_checkpoint", "load_checkpoint", "sole_writer", "write_json"]
HASHED_AT_ONCE = 1 << 24
# Of page-locked memory, to which checkpoints are copied: touched by threads and locked afterwards. As the driver makes it, in one
# thread, 12 GB take seconds, in which nothing else of the process reaches the GPU.
PAGE_LOCKING = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
# Size and SHA-256 of each file.
Manifest = dict[str, dict[str, Any]]


def checkpoints(run: Path) -> dict[int, Path]:
    """Checkpoint folders by step, in order. A folder with a manifest was written whole; without one it is none."""
    return {step: path for step, path in _named(run).items() if (path / "manifest.json").exists()}


def _named(run: Path) -> dict[int, Path]:
    """Whatever is called step_N, by step, in order: also what a copy or a removal that was stopped has left, and stray files."""
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


def lock_pages_by_threads() -> None:
    """Tell PyTorch so. What the environment says of its allocators is kept, and left alone where it says how to lock pages."""
    said = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # not in every torch that we take; it saves time alone
    if tell is not None and "pinned_" not in said and "cudaMallocAsync" not in said:
        tell(",".join(filter(None, (said, PAGE_LOCKING))))


class Saver:
    """Writes checkpoints of one run in a thread. `save` returns when everything is copied to memory; one is written at a time.

    On a mesh every rank has one; the folder must be the same on all machines.
    """

    def __init__(self, run: Path, ranks: Ranks, *, keep_last: int = 1, keep_every: int | None = None) -> None:
        self.folder, self.ranks, self.keep_last, self.keep_every = run / "checkpoints", ranks, keep_last, keep_every
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        if self._gpu is not None:
            lock_pages_by_threads()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, trained: dict[str, Tensor], optimizers: Optimizers, state: dict[str, Any]) -> None:
        """Begin `step_N`; an error of the one before is raised here, unless `wait` did."""
        self.wait()
        held = optimizers.tensors() | rng_tensors(self.ranks)
        if self.ranks.saving is None:
            files = {"model.safetensors": _copied(trained), "optimizer.safetensors": _copied(held)}
            write = partial(_write_files, files=files)
        else:
            everything = {f"model/{name}": t for name, t in trained.items()} | held
            write = partial(_write_pieces, held=pieces(self.ranks.parallel, _copied(everything)), group=self.ranks.saving)
        self._thread = threading.Thread(target=self._run, args=(write, state), name="checkpoint")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether the last one is still being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the last one could not be written: `wait` says why."""
        return self._error is not None

    def wait(self) -> None:
        """Until what was begun is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[Path], Manifest], state: dict[str, Any]) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)  # a thread begins on the first
            self._write(write, state)
            if self.ranks.main:
                self._prune(state["step"])
        except BaseException as error:  # raised by the next `save` or `wait`
            self._error = error

    def _write(self, write: Callable[[Path], Manifest], state: dict[str, Any]) -> None:
        final, draft = self.folder / f"step_{state['step']}", self.folder / ".draft"
        group = self.ranks.saving

        def begin() -> None:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            write_json(draft / "state.json", state)

        def finish() -> None:
            text = (draft / "state.json").read_bytes()
            manifest["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
            write_json(draft / "manifest.json", manifest)
            sync(draft)
            if final.exists():  # found damaged when the run resumed
                shutil.rmtree(final)
            draft.rename(final)
            sync(self.folder)

        try:
            told(begin, group)
            manifest = write(draft)
            told(finish, group)
        except OSError as error:
            if self.ranks.main:
                shutil.rmtree(draft, ignore_errors=True)
            resume = "free some space, then the same command with --resume"
            raise write_error(error, final, kept="the previous checkpoint is kept", resume=resume) from error

    def _prune(self, step: int) -> None:
        """Keep the last few and every so many steps; the one just written always stays. What is half removed goes too."""
        found = _named(self.folder.parent)
        kept = set([n for n in checkpoints(self.folder.parent) if n <= step][-self.keep_last :]) | {step}
        if self.keep_every is not None:
            kept |= {n for n in found if n % self.keep_every == 0}
        for n in found.keys() - kept:
            shutil.rmtree(found[n], ignore_errors=True)


def _write_files(draft: Path, files: dict[str, dict[str, Tensor]]) -> Manifest:
    return {name: _write_tensors(draft / name, tensors) for name, tensors in files.items()}


def _write_pieces(draft: Path, held: dict[str, Tensor], group: dist.ProcessGroup) -> Manifest:
    """Every rank writes a file and hashes it; the whole manifest is known to the main rank."""
    try:
        save_pieces(draft, held, group)
    except dcp.CheckpointException as error:  # raised by every rank, with the errors of all
        first = next(iter(error.failures.values()))[0]
        raise (first if isinstance(first, OSError) else error) from error
    number = dist.get_rank(group)
    mine = [*draft.glob(f"__{number}_*.distcp"), *([draft / METADATA] if number == 0 else [])]
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, {path.name: {"bytes": path.stat().st_size, "sha256": hashed(path)} for path in mine}, group)
    return {name: line for lines in everybody for name, line in lines.items()}


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


def hashed(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the files of a checkpoint, or None; every byte is read. share: (part, of parts) of the files."""
    if not (checkpoint / "manifest.json").exists():
        return "it has no manifest.json, which is written last"
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if "state.json" not in manifest:
            return "manifest.json does not name the files"
        for name, line in list(manifest.items())[share[0] :: share[1]]:
            path = checkpoint / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != line["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {line['bytes']}"
            if hashed(path) != line["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def whole_checkpoint(run: Path, say: Callable[[str], None], group: dist.ProcessGroup | None = None) -> Path | None:
    """The newest checkpoint that is whole; damaged ones after it are told and get another name, so that nothing merges them.
    None where there are none, a `UserError` where none is whole.

    group: ranks that share the reading; all of them call it.
    """
    left_out: dict[Path, str] = {}
    for path in told(lambda: list(reversed(_named(run).values())), group):
        wrong = _damage(path, group)
        if wrong is None:
            told(lambda: _set_aside(list(left_out)), group)
            return path
        left_out[path] = f"{path.name}: {wrong}"
        say(f"this checkpoint is damaged and left out: {left_out[path]}")
    if left_out:
        raise UserError(
            "the checkpoint is damaged, and there is no other", where=run / "checkpoints", value="; ".join(left_out.values()),
            next=f"remove {run} and train again",
        )  # fmt: skip
    return None


def _set_aside(damaged: list[Path]) -> None:
    for path in damaged:
        aside = path.with_name(f"damaged_{path.name}")
        with suppress(OSError):  # whoever reads it under its old name finds it damaged again, and says so
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def _damage(checkpoint: Path, group: dist.ProcessGroup | None) -> str | None:
    """`damage`, each rank of the group looking at some of the files."""
    if group is None:
        return damage(checkpoint)
    found: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, damage(checkpoint, (dist.get_rank(group), len(found))), group)
    return next(filter(None, found), None)


def load_checkpoint(checkpoint: Path, ranks: Ranks, trained: dict[str, Tensor], optimizers: Optimizers) -> dict[str, Any]:
    """Put trained tensors, optimiser state and random generators back in place; returns `state.json`.

    A mesh of another size goes on with generators as they are: their states belong to ranks.
    """
    found = open_checkpoint(checkpoint)
    wanted = pieces(ranks.parallel, {f"model/{name}": t.detach() for name, t in trained.items()})
    for key, tensor in wanted.items():
        if found.shapes.get(key) != tensor.shape:
            value = list(found.shapes[key]) if key in found.shapes else "missing"
            where = key.removeprefix("model/")
            raise UserError("the checkpoint is of another model", where=where, value=value, expected=list(tensor.shape))
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    generators = {name: t for name, t in rng_tensors(ranks).items() if found.shapes.get(name) == t.shape}
    found.fill(wanted | pieces(ranks.parallel, optimizers.adopt(found.shapes)) | generators)
    if state.get("ranks", 1) == ranks.count:
        set_rng(generators)
    return state


def load_start(checkpoint: Path, model: Ling, optimizers: Optimizers | None = None, ranks: Ranks | None = None) -> None:
    """Put the weights of an earlier stage's checkpoint into a model, and what it has of optimiser state.

    ranks: those that `model` is spread over already.
    """
    ranks = Ranks(Parallel(model, None, {})) if ranks is None else ranks
    found = open_checkpoint(checkpoint)
    mine: dict[str, Tensor] = {**ranks.parallel.held(dict(model.named_parameters())), **dict(model.named_buffers())}
    names = [key.removeprefix("model/") for key in found.shapes if key.startswith("model/")]
    names = [name for name in names if not is_elsewhere(model, name)]
    wanted = pieces(ranks.parallel, {f"model/{name}": mine[name].detach() for name in names if name in mine})
    for key in (f"model/{name}" for name in names):
        shape = wanted[key].shape if key in wanted else None
        if shape != found.shapes[key]:
            value, where = "no such tensor" if shape is None else list(shape), key.removeprefix("model/")
            expected = list(found.shapes[key])
            raise UserError("the earlier stage trained another model", where=where, value=value, expected=expected)
    found.fill(wanted | ({} if optimizers is None else pieces(ranks.parallel, optimizers.adopt(found.shapes))))


def trained_tensors(model: nn.Module, chosen: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """What training changes: the chosen parameters, and the router's biases, which are no parameters."""
    return {**chosen, **{name: b for name, b in model.named_buffers() if name.endswith("expert_bias")}}


def rng_tensors(ranks: Ranks) -> dict[str, Tensor]:
    """States of this rank's random generators."""
    behind = "" if ranks.mesh is None else f"/{ranks.number}"
    found = {f"rng/cpu{behind}": torch.get_rng_state()}
    if torch.cuda.is_available():
        found[f"rng/cuda{behind}"] = torch.cuda.get_rng_state()
    return found


def set_rng(states: dict[str, Tensor]) -> None:
    """Put back what `rng_tensors` returned."""
    for name, state in states.items():
        (torch.cuda.set_rng_state if name.startswith("rng/cuda") else torch.set_rng_state)(state)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
