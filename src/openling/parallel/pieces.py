"""Checkpoints that any mesh can read: every rank names the pieces of whole tensors that it holds, DCP writes each once.

A `Piece` stands in a dict for `torch.distributed.checkpoint`; its size is the whole tensor's. On loading, the pieces of the
present mesh are filled from those of the mesh that saved, in place. Replicated small things (buffers, steps) are plain tensors.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openling.parallel.apply import Parallel
from openling.parallel.table import Run, within
from openling.weights.dcp import Reader


class Piece(Tensor):
    """A stand-in for a whole tensor of which this rank holds `local`: what DCP asks a tensor of its own kind."""

    local: Tensor
    runs: tuple[tuple[Run, ...], ...]

    @staticmethod
    def of(local: Tensor, size: torch.Size, runs: tuple[tuple[Run, ...], ...]) -> Piece:
        """The runs say where each dim of `local` stands in the whole tensor; at most one dim has more than one."""
        piece: Piece = Tensor._make_wrapper_subclass(Piece, size, dtype=local.dtype, device=local.device)
        piece.local, piece.runs = local, runs
        return piece

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"a Piece holds a part of a tensor and cannot run {func}")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Piece({tuple(self.local.shape)} of {tuple(self.size())})"

    def copied(self, device: str) -> Piece:
        """The same with a copy of the local tensor: what an asynchronous save writes from."""
        return Piece.of(self.local.detach().to(device, copy=True), self.size(), self.runs)

    def blocks(self) -> list[tuple[ChunkStorageMetadata, Tensor]]:
        """The contiguous blocks: where in the whole tensor, and the local view."""
        blocks: list[tuple[list[int], list[int], Tensor]] = [([], [], self.local)]
        for dim, runs in enumerate(self.runs):
            blocks = [
                ([*offsets, r.start], [*sizes, r.length], view.narrow(dim, r.local, r.length))
                for offsets, sizes, view in blocks
                for r in runs
            ]
        return [(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)), view) for offsets, sizes, view in blocks]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk, _ in self.blocks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self.blocks()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for chunk, view in self.blocks() if chunk.offsets == index.offset)


def pieces(parallel: Parallel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts of parameters, or of tensors of their shapes, with their places in the whole. Names are KIND/PARAMETER.

    What is whole on every rank (buffers, numbers) stays as it is.
    """
    named = dict(parallel.model.named_parameters())

    def placed(key: str, local: Tensor) -> Tensor:
        name = key.partition("/")[2]
        if parallel.mesh is None or name not in named or not local.dim():
            return local
        part, p = parallel.parts[name], named[name]
        first, *rest = part.runs
        if isinstance(p, DTensor):
            shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            first = tuple(within(list(first), offset[0], offset[0] + shape[0]))
        return Piece.of(local, part.size, (first, *rest))

    return {key: placed(key, local) for key, local in tensors.items()}


def save(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write a DCP folder; every rank of the group calls it with its pieces. None: one process writes all."""
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)


def load(source: Path | Reader, tensors: dict[str, Tensor]) -> None:
    """Fill these pieces and tensors from a DCP folder of any mesh. Ranks need not call it together."""
    reader = source if isinstance(source, Reader) else Reader(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)  # as is meant
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
