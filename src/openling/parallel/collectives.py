"""The collectives of the model code, each with its gradient.

    copy      x on every rank -> x                  backward: sum over ranks     before a product split by columns
    total     sum over ranks  -> on every rank      backward: the same gradient  after a product split by rows
    joined    slices of a dim -> the whole          backward: sum, own slice     keys of a sequence cut over ranks
    exchange  rows to their ranks                   backward: rows back          tokens to experts

All ranks of a group call them in the same order, in both directions. Sums run in the dtype given. Of torch's two names of one
collective (2.13 renamed some) the one that exists is called.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, whose gradient is summed over the group: each rank goes on with another part of the weights."""
    return _Copy.apply(x, group)


def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' x on each of them; its gradient is the same everywhere and is passed on as it is."""
    return _Total.apply(x, group)


def joined(x_BT: Tensor, bounds: list[int], group: dist.ProcessGroup) -> Tensor:
    """The slices [B, T, ...] of all ranks, of rank r tokens bounds[r] to bounds[r + 1], in order along the second dim."""
    return _Joined.apply(x_BT, bounds, group)


def exchange(x_N: Tensor, given: list[int], taken: list[int], group: dist.ProcessGroup) -> Tensor:
    """The first given[0] rows go to rank 0, the next given[1] to rank 1, ...; returns what came, taken[r] rows from rank r."""
    return _Exchange.apply(x_N, given, taken, group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.bounds, ctx.group = bounds, group
        lengths = _lengths(bounds)
        mine = _padded(x, max(lengths))
        everybody = mine.new_empty((len(lengths), *mine.shape))
        all_gather_single(everybody.flatten(0, 1), mine, group=group)
        return torch.cat([part[:, :length] for part, length in zip(everybody, lengths, strict=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        lengths, rank = _lengths(ctx.bounds), dist.get_rank(ctx.group)
        parts = torch.stack([_padded(part, max(lengths)) for part in grads[0].split(lengths, dim=1)])
        mine = torch.empty_like(parts[0])
        reduce_scatter_single(mine, parts.flatten(0, 1), group=ctx.group)
        return mine[:, : lengths[rank]], None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, given: list[int], taken: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.given, ctx.taken, ctx.group = given, taken, group
        return _all_to_all(x, given, taken, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.taken, ctx.given, ctx.group), None, None, None


def _all_to_all(x_N: Tensor, given: list[int], taken: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x_N.new_empty((sum(taken), *x_N.shape[1:]))
    dist.all_to_all_single(out, x_N.contiguous(), taken, given, group=group)
    return out


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _lengths(bounds: list[int]) -> list[int]:
    return [b - a for a, b in zip(bounds, bounds[1:], strict=False)]


def _padded(x_BT: Tensor, tokens: int) -> Tensor:
    """[B, tokens, ...] with zeros behind, contiguous."""
    if x_BT.shape[1] == tokens:
        return x_BT.contiguous()
    out = x_BT.new_zeros((x_BT.shape[0], tokens, *x_BT.shape[2:]))
    out[:, : x_BT.shape[1]] = x_BT
    return out
