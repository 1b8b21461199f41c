"""Files of a checkpoint moved without torch: linked, copied whole or in part; every file appears whole or not at all.

Bytes go from file to file inside the kernel (`copy_file_range`, which shares blocks where the file system can), in pieces; what
arrived is hashed on the way. Memory is two pieces per file at work.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from torch import Tensor

from openling.errors import Failure, UserError
from openling.weights.headers import write_header
from openling.weights.io import INDEX, CheckpointReader, TensorFiles, raw_bytes, tensors_header
from openling.weights.whole import new_file, write_all

PIECE = 16 << 20
# What a conversion wrote and from what: the hashes that `openling verify` checks.
MANIFEST = "openling-files.json"
WEIGHTS = (".safetensors", ".distcp", ".bin", ".gguf")
# Of every source file this many blocks, evenly spread, tell whether it is still the same; all of it below 1 MiB.
SAMPLES, BLOCK = 256, 4096
_FICLONE = 0x40049409
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}

Action = Literal["link", "copy", "filter", "new"]


@dataclass(frozen=True)
class Kept:
    """A tensor of a new folder whose bytes are those of source tensors, one after the other (rows of one matrix)."""

    name: str
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """A file that is in place. sha256 is None for a link, whose bytes nobody has read."""

    file: str
    action: Action
    bytes: int
    sha256: str | None


def write_shard(path: Path, tensors: dict[str, Tensor]) -> Written:
    """A safetensors file of these tensors."""
    digest, total = hashlib.sha256(), 0
    with new_file(path) as out:
        for view in (memoryview(tensors_header(tensors)), *map(raw_bytes, tensors.values())):
            digest.update(view)
            total += len(view)
            write_all(out, view)
    return Written(path.name, "new", total, digest.hexdigest())


def link_file(source: Path, out: Path) -> Written:
    """The same bytes under another name: a hard link or, where there are none, shared blocks; a `UserError` otherwise."""
    size = source.stat().st_size
    out.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), out)
    except OSError as refused:
        try:
            with source.open("rb") as file, new_file(out) as clone:
                fcntl.ioctl(clone, _FICLONE, file.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            raise UserError(
                "a shard can be neither hard-linked nor reflinked to there",
                where=source,
                value=refused.strerror,
                expected="an output on the same file system (and mount) as the source",
                next="remove OUT.run, then --copy, or an output folder beside the source",
            ) from refused
    return Written(out.name, "link", size, None)


def copy_file(source: Path, out: Path) -> Written:
    """A copy of a whole file."""
    digest = hashlib.sha256()
    with source.open("rb") as file, new_file(out) as handle:
        size = os.fstat(file.fileno()).st_size
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        copy_range(file.fileno(), handle, 0, size, digest, source)
    return Written(out.name, "copy", size, digest.hexdigest())


def copy_tensors(reader: TensorFiles, tensors: list[Kept], out: Path) -> Written:
    """A safetensors file of these tensors, their bytes copied as they are."""
    entries = []
    for kept in tensors:
        spans = [reader.spans[piece] for piece in kept.pieces]
        shape = (sum(s.shape[0] for s in spans), *spans[0].shape[1:]) if len(spans) > 1 else spans[0].shape
        entries.append((kept.name, spans[0].dtype, shape, sum(s.nbytes for s in spans)))
    header = write_header(entries)
    digest, total = hashlib.sha256(header), len(header)
    with new_file(out) as handle, contextlib.ExitStack() as files:
        write_all(handle, memoryview(header))
        opened: dict[str, int] = {}
        for shard, start, end in _runs(reader, tensors):
            if shard not in opened:
                opened[shard] = files.enter_context((reader.folder / shard).open("rb")).fileno()
            copy_range(opened[shard], handle, start, end - start, digest, reader.folder / shard)
            total += end - start
    return Written(out.name, "filter", total, digest.hexdigest())


def _runs(reader: TensorFiles, tensors: list[Kept]) -> Iterator[tuple[str, int, int]]:
    """Byte ranges of the pieces in order, neighbours joined."""
    run: tuple[str, int, int] | None = None
    for span in (reader.spans[piece] for kept in tensors for piece in kept.pieces):
        if run is not None and (span.shard, span.start) == (run[0], run[2]):
            run = run[0], run[1], span.end
            continue
        if run is not None:
            yield run
        run = span.shard, span.start, span.end
    if run is not None:
        yield run


def copy_range(source: int, out: int, start: int, count: int, digest: hashlib._Hash, name: Path) -> None:
    """Append `count` bytes from `start` on; `digest` sees what arrived, in a thread, while the next piece is copied."""
    buffer = memoryview(bytearray(min(PIECE, count)))
    place, hashing = os.lseek(out, 0, os.SEEK_CUR), None
    with ThreadPoolExecutor(1) if count > PIECE else contextlib.nullcontext() as thread:
        while count:
            got = _copy_piece(source, out, start, min(count, PIECE))
            if not got:
                raise UserError("a weight shard has become shorter", where=name, next="copy or download this file again")
            if hashing is not None:
                hashing.result()
            if thread is None:
                _hash_piece(out, place, got, digest, buffer)
            else:
                hashing = thread.submit(_hash_piece, out, place, got, digest, buffer)
            os.posix_fadvise(source, start, got, os.POSIX_FADV_DONTNEED)
            start, place, count = start + got, place + got, count - got
        if hashing is not None:
            hashing.result()


def _copy_piece(source: int, out: int, start: int, count: int) -> int:
    try:
        return os.copy_file_range(source, out, count, offset_src=start)
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
    data = memoryview(os.pread(source, count, start))
    write_all(out, data)
    return len(data)


def _hash_piece(out: int, place: int, count: int, digest: hashlib._Hash, buffer: memoryview) -> None:
    seen = 0
    while seen < count:
        more = os.preadv(out, [buffer[: count - seen]], place + seen)
        digest.update(buffer[:more])
        seen += more
    os.posix_fadvise(out, place, count, os.POSIX_FADV_DONTNEED)  # has the disk begin to write it, too


def first_difference(kept: Kept, ours: TensorFiles, theirs: TensorFiles) -> str | None:
    """What differs between a tensor and its source pieces, or None."""
    if kept.name not in ours:
        return "absent"
    span, pieces = ours.spans[kept.name], [theirs.spans[p] for p in kept.pieces]
    if (span.dtype, span.nbytes) != (pieces[0].dtype, sum(p.nbytes for p in pieces)):
        return f"{span.dtype} of {span.nbytes} bytes, not {pieces[0].dtype}"
    path = ours.folder / span.shard
    start = span.start
    for piece in pieces:
        other = theirs.folder / piece.shard
        if not (path.samefile(other) and start == piece.start):
            pairs = zip(_blocks(path, start, piece.nbytes), _blocks(other, piece.start, piece.nbytes), strict=True)
            if any(a != b for a, b in pairs):
                return "its bytes differ"
        start += piece.nbytes
    return None


def _blocks(path: Path, start: int, count: int) -> Iterator[bytes]:
    handle = os.open(path, os.O_RDONLY)
    try:
        for at in range(0, count, PIECE):
            yield os.pread(handle, min(PIECE, count - at), start + at)
    finally:
        os.close(handle)


def read_ahead(reader: TensorFiles, names: list[str]) -> None:
    """Ask the system to load these tensors into its cache meanwhile; they cost this process no memory."""
    for shard, start, end in _runs(reader, [Kept(name, (name,)) for name in names]):
        handle = os.open(reader.folder / shard, os.O_RDONLY)
        os.posix_fadvise(handle, start, end - start, os.POSIX_FADV_WILLNEED)
        os.close(handle)


def companions(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that are no weights."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return [path for path in files if path.suffix not in WEIGHTS and path.name not in (INDEX, MANIFEST)]


def identity(path: Path) -> dict[str, object]:
    """What a source file is recognised by: size, time of its last change, a hash of blocks all over it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        _sample(file, about.st_size, digest)
    return {"bytes": about.st_size, "changed_ns": about.st_mtime_ns, "samples": digest.hexdigest()}


def fingerprint(folder: Path) -> str:
    """A hash of config, tokenizer, tensor names and shapes, and of blocks all over the weights: notices another model."""
    reader = CheckpointReader(folder)
    tensors = [(name, list(reader.shape(name)), str(reader.dtype(name))) for name in sorted(reader.names())]
    digest = hashlib.sha256(json.dumps(tensors).encode())
    for path in (folder / "config.json", folder / "tokenizer.json"):
        digest.update(path.read_bytes() if path.exists() else b"")
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            _sample(file, size, digest)
    return digest.hexdigest()


def _sample(file: BinaryIO, size: int, digest: hashlib._Hash) -> None:
    """Add blocks all over a file to a digest."""
    for start in range(0, size, max(BLOCK, size // SAMPLES)):
        file.seek(start)
        digest.update(file.read(BLOCK))


def file_hash(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(folder: Path, source: TensorFiles) -> dict[str, object]:
    """What `MANIFEST` says of a folder whose weight files are all new: the hashes of its files, and of what it was made."""
    shards = sorted({span.shard for span in source.spans.values()})
    weights = {path.name: _new(path) for path in sorted(folder.glob("*.safetensors"))}
    return {"shards": {shard: identity(source.folder / shard) for shard in shards}, "files": weights | small_files(folder)}


def small_files(folder: Path) -> dict[str, dict[str, object]]:
    """Hashes of a folder's files that are no weights, as `MANIFEST` has them; not of the model card, which its user may edit."""
    found = [path for path in (*companions(folder), folder / INDEX) if path.is_file() and path.name != "README.md"]
    return {path.name: _new(path) for path in found}


def _new(path: Path) -> dict[str, object]:
    return {"action": "new", "bytes": path.stat().st_size, "sha256": file_hash(path)}


def check_unchanged(path: Path, before: dict[str, object], *, thorough: bool) -> None:
    """Raise a Failure where a source file is no longer what it was; `thorough` reads its blocks too."""
    about = path.stat()
    now: dict[str, object] = {"bytes": about.st_size, "changed_ns": about.st_mtime_ns}
    if thorough:
        now = identity(path)
    wrong = [key for key, value in now.items() if before[key] != value]
    if wrong:
        raise Failure(
            "a shard of the source has changed on disk during the conversion",
            where=path,
            value=", ".join(f"{key}: {now[key]}" for key in wrong),
            expected=", ".join(f"{key}: {before[key]}" for key in wrong),
            next="restore that file and resume, or remove the run folder and begin again",
        )
