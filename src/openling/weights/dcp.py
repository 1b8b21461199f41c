"""Safetensors folders to and from torch's distributed checkpoints (DCP), tensor by tensor, to the bit.

DCP is what `torch.distributed.checkpoint` reads and writes, sharded over any number of ranks. A DCP folder of ours also has the
small files of the checkpoint (config, tokenizer), so that the way back gives a complete folder. Non-tensor entries of a foreign
DCP folder (step counters) are left out.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from openling.errors import UserError
from openling.weights.files import companions
from openling.weights.io import (
    SHARD_BYTES,
    CheckpointReader,
    FolderWriter,
    TensorFiles,
    checked_folder,
    write_error,
)

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
        shapes = {name: torch.empty(reader.shape(name), dtype=reader.dtype(name), device="meta") for name in reader.names()}
        writer = dcp.FileSystemWriter(draft, single_file_per_rank=True, thread_count=1)
        dcp.save(shapes, storage_writer=writer, planner=_Lazy(reader), no_dist=True)
        for path in companions(reader.folder):
            shutil.copyfile(path, draft / path.name)
        draft.rename(final)
    except OSError as error:
        raise write_error(error, final) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def from_dcp(source: str | Path, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the tensors of the DCP folder `source` as the new safetensors folder `out`; memory is one shard and one batch."""
    folder = checked_folder(source)
    if not (folder / METADATA).is_file():
        raise UserError("this is no DCP folder", where=folder, expected=f"the file {METADATA} and *.distcp beside it")
    reader = Reader(folder)
    found = {name: m for name, m in reader.read_metadata().state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
    if not found:
        raise UserError("this DCP folder holds no tensors", where=folder)
    sizes = {name: m.size.numel() * m.properties.dtype.itemsize for name, m in found.items()}
    writer = FolderWriter(out, shard_bytes=shard_bytes, expected_bytes=sum(sizes.values()))
    with writer:
        batch: dict[str, Tensor] = {}
        for name, about in found.items():
            if batch and sum(sizes[n] for n in batch) + sizes[name] > BATCH_BYTES:
                _load(batch, reader, writer)
                batch = {}
            batch[name] = torch.empty(about.size, dtype=about.properties.dtype)
        _load(batch, reader, writer)
        for path in companions(folder):
            writer.add_file(path.name, path.read_bytes())
    return writer.out


def _load(batch: dict[str, Tensor], reader: dcp.FileSystemReader, writer: FolderWriter) -> None:
    dcp.load(batch, storage_reader=reader, no_dist=True)
    for name, tensor in batch.items():
        writer.add(name, tensor)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError("the output folder exists already", where=out, next="name another folder, or remove this one first")
