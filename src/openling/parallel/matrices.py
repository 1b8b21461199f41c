"""Whole matrices of parameters that ranks hold in parts, for an optimiser that needs them whole (Muon).

FSDP leaves a rank some rows of a matrix, tensor ranks leave it some rows or columns. Stacked experts are split between matrices
by FSDP and expert ranks, and inside of them by tensor ranks alone. Every rank gathers the whole; nothing of it is kept.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openling.model.config import ModelConfig
from openling.parallel.apply import Parallel
from openling.parallel.collectives import all_gather_single
from openling.parallel.mesh import Mesh
from openling.parallel.table import held


class Matrix:
    """One parameter of two or more dims: how its parts become whole, and the other way round."""

    def __init__(self, name: str, p: nn.Parameter, config: ModelConfig, mesh: Mesh, size: torch.Size) -> None:
        """p: as the model holds it; size: of the whole parameter."""
        sharded = isinstance(p, DTensor) and p.dim() == 2 and mesh.axes.shards > 1
        self.shards = mesh.dense.get_group("shard") if sharded else None
        ranks = mesh.axes.tensor
        # Dim 0 of stacked experts counts matrices: it stays as it is.
        runs = [held(name, size, config, (rank, ranks), (0, 1)).runs for rank in range(ranks)]
        self.dims = [dim for dim in range(p.dim() - 2, p.dim()) if runs[0][dim][0].length != size[dim]]
        self.tensor = mesh.group("tensor") if self.dims else None
        self.runs, self.size, self.rows = runs, size, p.shape[0]

    def whole(self, local: Tensor) -> Tensor:
        """The whole matrix, or the whole matrices of this rank's experts. Every rank of its groups calls it."""
        if self.shards is not None:
            per_rank = -(-self.rows // dist.get_world_size(self.shards))
            padded = local.new_zeros((per_rank, *local.shape[1:]))
            padded[: local.shape[0]] = local
            local = _gathered(padded, self.shards).flatten(0, 1)[: self.rows]
        if self.tensor is None:
            return local
        parts, dim = _gathered(local, self.tensor), self.dims[0]
        out = local.new_empty([n if d == dim else local.shape[d] for d, n in enumerate(self.size)])
        for part, runs in zip(parts, self.runs, strict=True):
            for r in runs[dim]:
                out.narrow(dim, r.start, r.length).copy_(part.narrow(dim, r.local, r.length))
        return out

    def mine(self, whole: Tensor) -> Tensor:
        """This rank's part of it."""
        if self.tensor is not None:
            dim = self.dims[0]
            runs = self.runs[dist.get_rank(self.tensor)][dim]
            whole = torch.cat([whole.narrow(dim, r.start, r.length) for r in runs], dim)
        if self.shards is None:
            return whole
        per_rank = -(-self.rows // dist.get_world_size(self.shards))
        first = dist.get_rank(self.shards) * per_rank
        return whole[first : first + per_rank]


def matrices(parallel: Parallel, held: dict[str, nn.Parameter]) -> dict[nn.Parameter, Matrix]:
    """For those of `Parallel.held` that have matrices, how to gather them; empty without a mesh."""
    if parallel.mesh is None:
        return {}
    named, config = dict(parallel.model.named_parameters()), parallel.model.config
    return {
        p: Matrix(name, named[name], config, parallel.mesh, parallel.parts[name].size) for name, p in held.items() if p.dim() >= 2
    }


def _gathered(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...] of tensors of one shape."""
    out = local.new_empty((dist.get_world_size(group), *local.shape))
    all_gather_single(out.flatten(0, 1), local.contiguous(), group=group)
    return out
