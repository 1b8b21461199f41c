"""Expert parallelism: each rank holds some of a layer's experts, and tokens travel to them and back.

A token goes once to every rank that has experts for it, with its weights; that rank returns the weighted sum of its experts. So
with E ranks a token is sent to at most min(E, top_k) of them, not to all top_k experts. Per layer and direction: one all-to-all
of counts (and a wait for them, as the rows of a split must be known on the host), one of rows, one of weights; and one back.

Everything is in a fixed order: rows by rank, then by token; sums over ranks, and over a token's experts, in rising order. No row
is added to twice in one kernel, so results repeat bit for bit on GPUs too.

Legend: N tokens, M model width, k experts per token, P expert ranks, R rows that came, S of them once per local
expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openling.model.ling import Experts, SparseMoE
from openling.ops.moe import count_tokens
from openling.parallel.collectives import copy, exchange, total


class ShardedMoE(SparseMoE):
    """Routed experts split over expert ranks, their columns over tensor ranks; `None` for an axis of one rank."""

    expert_group: dist.ProcessGroup | None
    tensor_group: dist.ProcessGroup | None

    def routed(self, x_NM: Tensor) -> tuple[Tensor, Tensor | None]:
        """As of the whole layer."""
        weight_Nk, index_Nk = self.gate(x_NM)
        counts_E = None
        if self.chosen is not None:
            self.chosen.append(index_Nk)
        elif self.training:
            counts_E = count_tokens(index_Nk, self.gate.weight.shape[0])
        if self.tensor_group is not None:
            x_NM, weight_Nk = copy(x_NM, self.tensor_group), copy(weight_Nk, self.tensor_group)
        if self.expert_group is None:
            out = self.experts(x_NM, weight_Nk, index_Nk)
        else:
            out = self._elsewhere(x_NM, weight_Nk, index_Nk, self.expert_group)
        return (out if self.tensor_group is None else total(out, self.tensor_group)), counts_E

    def _elsewhere(self, x_NM: Tensor, weight_Nk: Tensor, index_Nk: Tensor, group: dist.ProcessGroup) -> Tensor:
        ranks, local = dist.get_world_size(group), self.experts.gate_proj.shape[0]
        owner_Nk = index_Nk // local
        wanted_PN = torch.stack([(owner_Nk == rank).any(-1) for rank in range(ranks)])
        rows, given = _rows(wanted_PN)
        taken = _exchanged_counts(wanted_PN.sum(1), group)
        x_RM = exchange(spread(x_NM, rows, given), given, taken, group)
        weight_Rk = exchange(spread(weight_Nk, rows, given), given, taken, group)
        index_Rk = exchange(index_Nk[rows], given, taken, group)
        y_RM = self._here(x_RM, weight_Rk, index_Rk - dist.get_rank(group) * local)
        return collect(exchange(y_RM, taken, given, group), rows, given, x_NM.shape[0])

    def _here(self, x_RM: Tensor, weight_Rk: Tensor, index_Rk: Tensor) -> Tensor:
        """Weighted sum of the local experts for the rows that came; indices outside are of other ranks' experts."""
        mine_kR = ((index_Rk >= 0) & (index_Rk < self.experts.gate_proj.shape[0])).T
        rows, sizes = _rows(mine_kR)
        slots = mine_kR.nonzero()[:, 0]
        x_SM, weight_S1, index_S1 = spread(x_RM, rows, sizes), weight_Rk[rows, slots][:, None], index_Rk[rows, slots][:, None]
        y_SM = self.experts(x_SM, weight_S1, index_S1)
        return collect(y_SM, rows, sizes, x_RM.shape[0])


class ShardedExperts(Experts):
    """The local experts, which may get no token at all."""

    def forward(self, x_NM: Tensor, weight_Nk: Tensor, index_Nk: Tensor) -> Tensor:
        """Weighted sum of the chosen experts, [N, M]."""
        if x_NM.shape[0]:
            return super().forward(x_NM, weight_Nk, index_Nk)
        # No rows, but a graph: in backward this rank takes part in the collectives, and its experts' gradients are zeros.
        return x_NM * weight_Nk.to(x_NM.dtype) + sum(p[:0].sum() for p in self.parameters())


def shard_experts(moe: SparseMoE, expert: dist.ProcessGroup | None, tensor: dist.ProcessGroup | None) -> None:
    """Make a layer work on its part of the experts: call it beside `take_parts`."""
    moe.__class__ = ShardedMoE
    assert isinstance(moe, ShardedMoE)
    moe.experts.__class__ = ShardedExperts
    moe.expert_group, moe.tensor_group = expert, tensor


def _rows(wanted_PN: Tensor) -> tuple[Tensor, list[int]]:
    """Indices of the wanted rows, one part of P after the other, rising in each; and the parts' sizes (the host waits)."""
    return wanted_PN.nonzero()[:, 1], wanted_PN.sum(1).tolist()


def _exchanged_counts(counts_P: Tensor, group: dist.ProcessGroup) -> list[int]:
    """How many rows come from every rank."""
    out = torch.empty_like(counts_P)
    dist.all_to_all_single(out, counts_P, group=group)
    return out.tolist()


def spread(x_NM: Tensor, rows: Tensor, sizes: list[int]) -> Tensor:
    """x[rows]. No row comes twice in one of the parts of these sizes; the gradient adds part after part."""
    return _Spread.apply(x_NM, rows, sizes)


def collect(y_RM: Tensor, rows: Tensor, sizes: list[int], count: int) -> Tensor:
    """The opposite: [count, M], to whose `rows` y is added part after part."""
    return _Collect.apply(y_RM, rows, sizes, count)


def _added(y_RM: Tensor, rows: Tensor, sizes: list[int], count: int) -> Tensor:
    wide = torch.promote_types(y_RM.dtype, torch.float32)
    out = torch.zeros((count, y_RM.shape[1]), dtype=wide, device=y_RM.device)
    for y, part in zip(y_RM.split(sizes), rows.split(sizes), strict=True):
        out.index_add_(0, part, y.to(wide))
    return out.to(y_RM.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.sizes, ctx.count = sizes, x.shape[0]
        return x[rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _added(grads[0], ctx.saved_tensors[0], ctx.sizes, ctx.count), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, sizes: list[int], count: int) -> Tensor:
        ctx.save_for_backward(rows)
        return _added(y, rows, sizes, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0][ctx.saved_tensors[0]], None, None, None
