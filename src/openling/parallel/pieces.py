"""Checkpoints that any mesh can read: every rank names the pieces of whole tensors that it holds, DCP writes each once.

`tensors(parallel, optimizer)` gives a flat dict for `torch.distributed.checkpoint`: "model.<name>" and "optimizer.<name>.<slot>"
as a `Piece`, whose size is the whole tensor's. On loading, DCP fills the pieces of the present mesh from those of the mesh that
saved, in place. Replicated small things (buffers, steps) are whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openling.parallel.apply import Parallel
from openling.parallel.table import Held, Run, within


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

    def _blocks(self) -> list[tuple[ChunkStorageMetadata, Tensor]]:
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
            for chunk, _ in self._blocks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self._blocks()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for chunk, view in self._blocks() if chunk.offsets == index.offset)


def tensors(parallel: Parallel, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """What a checkpoint holds of model and optimiser. The optimiser must have stepped, or have been given its state."""
    model = parallel.model
    found: dict[str, Any] = {}
    for name, p in model.named_parameters():
        runs, size = _runs(parallel, name, p)
        found[f"model.{name}"] = Piece.of(_data(p), size, runs)
        for slot, value in optimizer.state.get(p, {}).items() if optimizer is not None else ():
            key = f"optimizer.{name}.{slot}"
            found[key] = Piece.of(_data(value), size, runs) if value.dim() else value
    found |= {f"model.{name}": b for name, b in model.named_buffers() if b is not None}
    return found


def save(folder: Path, parallel: Parallel, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write a DCP folder; every rank calls it."""
    dcp.save(tensors(parallel, optimizer), checkpoint_id=folder, no_dist=parallel.mesh is None)


def load(folder: Path, parallel: Parallel, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill model and optimiser, of any mesh, from a DCP folder; every rank calls it."""
    if optimizer is not None:
        _give_state(optimizer)
    dcp.load(tensors(parallel, optimizer), checkpoint_id=folder, no_dist=parallel.mesh is None)


def _give_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser make its state: one step with zero gradients and no learning rate, which changes no parameter."""
    kept = [(group, group["lr"]) for group in optimizer.param_groups]
    gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    for group, _ in kept:
        group["lr"] = 0.0
    for p in gradients:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, lr in kept:
        group["lr"] = lr
    for p, gradient in gradients.items():
        p.grad = gradient


def _runs(parallel: Parallel, name: str, p: nn.Parameter) -> tuple[tuple[tuple[Run, ...], ...], torch.Size]:
    """Where this rank's part of a parameter stands, after tensor and expert ranks and FSDP; and the whole size."""
    part = parallel.parts.get(name) or Held(p.shape, tuple((Run(0, 0, n),) for n in p.shape))
    first, *rest = part.runs
    if isinstance(p, DTensor):
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        first = tuple(within(list(first), offset[0], offset[0] + shape[0]))
    return (first, *rest), part.size


def _data(x: Tensor) -> Tensor:
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x
