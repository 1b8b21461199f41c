"""Safetensors folders to and from torch's distributed checkpoints (DCP), tensor by tensor, to the bit.

DCP is what `torch.distributed.checkpoint` reads and writes, sharded over any number of ranks. A DCP folder of ours also has the
small files of the checkpoint (config, tokenizer), so that the way back gives a complete folder. Non-tensor entries of a foreign
DCP folder (step counters) are left out.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from openling.errors import OpenlingError, UserError
from openling.weights.files import companions
from openling.weights.io import (
    SHARD_BYTES,
    CheckpointReader,
    FolderWriter,
    TensorFiles,
    check_space,
    checked_folder,
    write_error,
)
from openling.weights.linked import clean_companions

# Tensors of a DCP folder that are read at once: opening its metadata costs more than a small tensor.
BATCH_BYTES = 1 << 30
METADATA = ".metadata"


class _Lazy(dcp.DefaultSavePlanner):
    """Plans from shapes alone; a tensor is read when its turn to be written comes."""

    def __init__(self, reader: TensorFiles) -> None:
        super().__init__()
        self.reader = reader

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.reader.read(index.fqn)


class Reader(dcp.FileSystemReader):
    """Reads the metadata of a folder, which names every piece of every tensor, once, however often tensors are loaded from it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The folder's metadata."""
        if self.known is None:
            self.known = super().read_metadata(*args, **kwargs)
        return self.known


def to_dcp(source: str | Path, out: str | Path) -> Path:
    """Write the safetensors folder `source` as the new DCP folder `out`, which appears whole; memory is one tensor."""
    reader, final = CheckpointReader(source), Path(out).absolute()
    _refuse_existing(final)
    draft = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        check_space(draft.parent, reader.total_bytes)
        shapes = {name: torch.empty(reader.shape(name), dtype=reader.dtype(name), device="meta") for name in reader.names()}
        writer = dcp.FileSystemWriter(draft, single_file_per_rank=True, thread_count=1)
        with _unwrapped():
            dcp.save(shapes, storage_writer=writer, planner=_Lazy(reader), no_dist=True)
        for name, data in clean_companions(reader).items():
            (draft / name).write_bytes(data)
        draft.rename(final)
    except OSError as error:
        raise write_error(error, final) from error
    except RuntimeError as error:  # torch's writer tells where in its file it failed, not why
        full = shutil.disk_usage(draft).free < 1 << 20
        known = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else OSError(str(error))
        raise write_error(known, final) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def from_dcp(source: str | Path, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the tensors of the DCP folder `source` as the new safetensors folder `out`; memory is one shard and one batch."""
    folder = checked_folder(source)
    if not (folder / METADATA).is_file():
        raise UserError("this is no DCP folder", where=folder, expected=f"the file {METADATA} and *.distcp beside it")
    reader = Reader(folder)
    with _damage(folder / METADATA):
        metadata = reader.read_metadata()
    found = {name: m for name, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
    if not found:
        raise UserError("this DCP folder holds no tensors", where=folder)
    _check_parts(folder, metadata)
    sizes = {name: m.size.numel() * m.properties.dtype.itemsize for name, m in found.items()}
    writer = FolderWriter(out, shard_bytes=shard_bytes, expected_bytes=sum(sizes.values()))
    with writer:
        batch: dict[str, Tensor] = {}
        for name, about in found.items():
            if batch and sum(sizes[n] for n in batch) + sizes[name] > BATCH_BYTES:
                _load(batch, folder, reader, writer)
                batch = {}
            batch[name] = torch.empty(about.size, dtype=about.properties.dtype)
        _load(batch, folder, reader, writer)
        for path in companions(folder):
            writer.add_file(path.name, path.read_bytes())
    return writer.out


def _load(batch: dict[str, Tensor], folder: Path, reader: Reader, writer: FolderWriter) -> None:
    with _damage(folder):
        dcp.load(batch, storage_reader=reader, no_dist=True)
    for name, tensor in batch.items():
        writer.add(name, tensor)


def _check_parts(folder: Path, metadata: Metadata) -> None:
    """Raise a UserError where a part is not there, or ends before its last piece."""
    ends: dict[str, int] = {}
    for piece in metadata.storage_data.values():
        ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            raise UserError("a part of this DCP folder is missing", where=path, next="copy the folder again")
        if (size := path.stat().st_size) < end:
            what, fix = "a part of this DCP folder is truncated", "copy this file again"
            raise UserError(what, where=path, value=f"{size} bytes", expected=f"at least {end}", next=fix)


@contextmanager
def _unwrapped() -> Iterator[None]:
    """What went wrong in this process, instead of the exception that torch makes of every rank's."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """A UserError for whatever torch meets in files that it cannot read, which may be any exception."""
    try:
        with _unwrapped():
            yield
    except (OpenlingError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            "this DCP folder is damaged",
            where=path,
            value=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            expected="files as torch.distributed.checkpoint writes them",
            next="copy the folder again",
        ) from error


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError("the output folder exists already", where=out, next="name another folder, or remove this one first")
