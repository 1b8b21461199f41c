"""Safetensors folders, streamed: a reader that knows every tensor from the headers alone, a writer whose folder appears whole.

Layout: `model.safetensors`, or shards named by `model.safetensors.index.json`
(`{"metadata": {"total_size": bytes, "stale_in": [shards]}, "weight_map": {tensor: shard}}`). Shards that `stale_in` lists
are shared with another checkpoint: of their tensors only those that the index promises count (openling's own key).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from openling.errors import Failure, OpenlingError, UserError, nearest
from openling.weights.headers import DTYPE_NAMES, DTYPES, Span, read_header, write_header
from openling.weights.whole import NO_SPACE

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
MORE_SPACE = "free some space, or name a folder on another disk"
LFS_POINTER = b"version https://git-lfs"

# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def checked_folder(folder: str | Path) -> Path:
    """The path of an existing folder, or a `UserError` that names the nearest folder beside it."""
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            "a checkpoint is a folder, not a file", where=path, expected="a folder with config.json and *.safetensors"
        )
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    similar = nearest(path.name, beside)
    raise UserError(
        "no such folder",
        where=path,
        expected="the path of a local checkpoint folder (models are not downloaded)",
        nearest=path.parent / similar if similar else None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` when it is absent, unreadable, no JSON or no object."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path.name} is missing", where=path.parent, expected="a complete checkpoint folder") from error
    except OSError as error:
        raise UserError(f"{path.name} cannot be read", where=path, value=error.strerror) from error
    _check_no_pointer(path, data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # the second where it is nested too deeply
        raise UserError(f"{path.name} is not valid JSON", where=path, value=error, expected="a JSON object") from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} is not a JSON object", where=path, value=type(value).__name__, expected="{...}")
    return value


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder."""
    return read_json(checked_folder(folder) / "config.json")


class TensorFiles:
    """Tensors of some safetensors files in one folder. Only `read` touches weights, one tensor at a time.

    Weights are read, never mapped: memory is what the caller holds, and a file that shrinks meanwhile is an error, not a signal.
    """

    def __init__(self, folder: Path, spans: dict[str, Span]) -> None:
        self.folder = folder
        self.spans = spans

    @classmethod
    def of(cls, folder: Path, shards: Iterable[str]) -> TensorFiles:
        """All tensors of these files, whose headers must be in order."""
        return TensorFiles(folder, {name: span for shard in shards for name, span in read_header(folder / shard).items()})

    def names(self) -> list[str]:
        """All tensor names, in the order of the files."""
        return list(self.spans)

    def __contains__(self, name: object) -> bool:
        return name in self.spans

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its header."""
        return self.spans[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, from its header."""
        stored = self.spans[name].dtype
        if stored not in DTYPES:
            raise UserError(
                "unsupported tensor dtype", where=f"{name} in {self.folder}", value=stored, expected=", ".join(DTYPES)
            )
        return DTYPES[stored]

    def nbytes(self, name: str) -> int:
        """Stored bytes of a tensor."""
        return self.spans[name].nbytes

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(span.nbytes for span in self.spans.values())

    def read(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU, in memory of its own."""
        return self.read_rows(name, 0, None)

    def read_rows(self, name: str, first: int, count: int | None) -> Tensor:
        """`count` entries along the first dimension from `first` on; None: all of the tensor."""
        span = self.spans[name]
        shape = span.shape if count is None else (count, *span.shape[1:])
        out = torch.empty(shape, dtype=self.dtype(name))
        start = span.start if count is None else span.start + first * (span.nbytes // span.shape[0])
        path = self.folder / span.shard
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError("a weight shard cannot be read", where=path, value=error.strerror) from error
        try:
            view = raw_bytes(out)
            while len(view):
                got = os.preadv(handle, [view], start)
                if not got:
                    raise UserError(
                        "a weight shard has become shorter",
                        where=path,
                        value=f"{name} ends at byte {span.end}",
                        next="copy or download this file again",
                    )
                view, start = view[got:], start + got
        finally:
            os.close(handle)
        return out


class CheckpointReader(TensorFiles):
    """The tensors of a checkpoint folder. Opening it checks every header."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(checked_folder(folder), {})
        self.stale_in: list[str] = []
        promised = self._promised()
        self.shards = sorted(set(promised.values())) if promised is not None else [SINGLE]
        self.stored_in: dict[str, int] = {}  # tensors in each shard's file, stale ones too
        for shard in self.shards:
            header = self._header(shard)
            self.stored_in[shard] = len(header)
            for name, span in header.items():
                if shard in self.stale_in and (promised or {}).get(name) != shard:
                    continue
                if name in self.spans:
                    both = f"{self.spans[name].shard} and {shard}"
                    raise self._broken("a tensor is stored twice", name, both, "one shard")
                self.spans[name] = span
        for name, shard in (promised or {}).items():
            found = self.spans[name].shard if name in self.spans else "nowhere"
            if found != shard:
                raise self._broken("a tensor of the index is not in its shard", name, found, shard)

    def _promised(self) -> dict[str, str] | None:
        """`weight_map` of the index, or None for a single file."""
        if (self.folder / INDEX).exists():
            index = read_json(self.folder / INDEX)
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
                raise UserError(
                    "the index lists no tensors", where=self.folder / INDEX, expected='{"weight_map": {tensor: shard}}'
                )
            if (self.folder / SINGLE).exists() and SINGLE not in weight_map.values():
                raise UserError(
                    "this folder holds two sets of weights",
                    where=self.folder,
                    value=f"{SINGLE}, which transformers would read, and the shards of {INDEX}",
                    expected="one of them",
                    next=f"move {SINGLE} away, or {INDEX} with its shards",
                )
            metadata = index.get("metadata")
            stale = metadata.get("stale_in", []) if isinstance(metadata, dict) else []
            if not (isinstance(stale, list) and all(isinstance(shard, str) for shard in stale)):
                where = f"metadata.stale_in in {self.folder / INDEX}"
                raise UserError("this entry of the index is not valid", where=where, value=stale, expected="a list of shards")
            self.stale_in = stale
            return weight_map
        if (self.folder / SINGLE).exists():
            return None
        others = sorted(p.name for p in self.folder.glob("*.bin")) + sorted(p.name for p in self.folder.glob("*.gguf"))
        raise UserError(
            "no safetensors weights in this folder",
            where=self.folder,
            value=", ".join(others) or None,
            expected=f"{SINGLE} or {INDEX}",
            next=self._how_to_convert(others),
        )

    def _how_to_convert(self, others: list[str]) -> str | None:
        if any(name.endswith(".bin") for name in others):
            return (
                'convert once with transformers: AutoModelForCausalLM.from_pretrained(folder, dtype="auto")'
                ".save_pretrained(new_folder), then copy the tokenizer files"
            )
        return "openling.weights.gguf.import_gguf(file, new_folder)" if others else None

    def _header(self, shard: str) -> dict[str, Span]:
        path = self.folder / shard
        if not path.is_file():
            present = [p.name for p in self.folder.glob("*.safetensors")]
            raise UserError(
                "a weight shard is missing", where=path, expected=f"the file {shard}", nearest=nearest(shard, present)
            )
        try:
            with path.open("rb") as file:
                _check_no_pointer(path, file.read(len(LFS_POINTER)))
            return read_header(path)
        except (OSError, ValueError) as error:
            raise UserError(
                "a weight shard is damaged or truncated",
                where=path,
                value=f"{path.stat().st_size} bytes; {error}",
                expected="a whole safetensors file",
                next="copy or download this file again",
            ) from error

    def _broken(self, what: str, name: str, found: str, expected: str) -> UserError:
        return UserError(what, where=f"{name} in {self.folder}", value=found, expected=expected, next="copy the folder again")


def _check_no_pointer(path: Path, head: bytes) -> None:
    if head.startswith(LFS_POINTER):
        raise UserError(
            "this file is a Git LFS pointer, not the file itself", where=path, next=f"git lfs pull --include {path.name}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class FolderWriter:
    """Writes a checkpoint folder beside its final place; leaving the `with` block without an error makes it appear at once.

    Tensors are kept until a shard is full, so memory stays below `shard_bytes` beyond the caller's own. A killed writer
    leaves only `.NAME.partial`, which the next writer of the same folder clears; a second writer at the same time is refused.
    """

    def __init__(self, out: str | Path, *, shard_bytes: int = SHARD_BYTES, expected_bytes: int = 0) -> None:
        self.out = Path(out).absolute()
        self.draft = self.out.with_name(f".{self.out.name}.partial")
        self.shard_bytes = shard_bytes
        self.expected_bytes = expected_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0
        self._lock: int | None = None

    def __enter__(self) -> Self:
        self._refuse_existing()
        try:
            self.draft.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.draft, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                "another process is writing this folder", where=self.out, next="wait for it, or name another"
            ) from error
        except OSError as error:
            raise write_error(error, self.out) from error
        # The other writer may have finished between the first look and the lock.
        self._refuse_existing()
        try:
            for leftover in self.draft.iterdir():
                leftover.unlink()
            check_space(self.draft.parent, self.expected_bytes)
        except BaseException:
            self._discard()
            raise
        return self

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.out):
            raise UserError(
                "the output folder exists already", where=self.out, next="name another folder, or remove this one first"
            )

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor. Its values are written when the shard is full or at the end."""
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size

    def add_file(self, name: str, data: str | bytes) -> None:
        """Write a small file of the folder."""
        self._write(self.draft / name, [data.encode() if isinstance(data, str) else data])

    def _flush(self) -> None:
        if self._pending:
            path = self.draft / f"shard-{len(self._shards):05d}"
            self._write(path, [tensors_header(self._pending), *self._pending.values()])
            self._shards.append(list(self._pending))
            self._total += self._pending_bytes
            self._pending, self._pending_bytes = {}, 0

    def _write(self, path: Path, pieces: list[bytes | Tensor]) -> None:
        try:
            with path.open("wb") as file:
                for piece in pieces:
                    file.write(raw_bytes(piece) if isinstance(piece, Tensor) else piece)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(error, self.out) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failed:
            raise write_error(failed, self.out) from failed
        finally:
            self._discard()

    def _finish(self) -> None:
        self._flush()
        count = len(self._shards)
        if count == 1:
            (self.draft / "shard-00000").rename(self.draft / SINGLE)
        elif count:
            weight_map: dict[str, str] = {}
            for i, names in enumerate(self._shards):
                shard = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
                (self.draft / f"shard-{i:05d}").rename(self.draft / shard)
                weight_map |= dict.fromkeys(names, shard)
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            self.add_file(INDEX, json.dumps(index, indent=2) + "\n")
        assert self._lock is not None
        os.fsync(self._lock)
        self._refuse_existing()
        self.draft.rename(self.out)
        parent = os.open(self.out.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)

    def _discard(self) -> None:
        """Remove the draft if it is still there (it is not after the final rename) and let go of the lock."""
        if self._lock is not None:
            shutil.rmtree(self.draft, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.close(self._lock)
            self._lock = None


def check_outside(out: Path, *read_only: Path) -> None:
    """Raise a UserError where a new folder would lie inside one that is only read."""
    around = Path(os.path.realpath(out)).parents
    if any(Path(os.path.realpath(folder)) in around for folder in read_only):
        raise UserError("the output lies inside a folder that is only read", where=out, next="choose a folder outside it")


def check_space(folder: Path, needed: int, what: str = "not enough space on the disk", fix: str = MORE_SPACE) -> None:
    """Raise a UserError where the disk of a folder that is about to be filled has not that many bytes left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(what, where=folder, value=f"{free:,} bytes free", expected=f"{needed:,}", next=fix)


def write_error(error: OSError, out: Path, *, kept: str = "nothing was kept", resume: str | None = None) -> OpenlingError:
    """What an `OSError` met while writing `out` means to the user; what is `kept`, and how a run that resumes goes on."""
    if error.errno in NO_SPACE:
        what, fix = f"no space left while writing; {kept}", resume or MORE_SPACE
        free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.exists())).free
        return UserError(what, where=out, value=f"{error.strerror}, {free:,} bytes free", next=fix)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG):
        return UserError(
            "the output folder cannot be written", where=out, value=error.strerror, expected="a writable, new folder"
        )
    return Failure(f"writing failed; {kept}", where=out, value=error, next=resume)


def tensors_header(tensors: dict[str, Tensor]) -> bytes:
    """The safetensors header of these tensors."""
    return write_header((n, DTYPE_NAMES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items())


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major, little-endian; those of a contiguous CPU tensor are its memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
