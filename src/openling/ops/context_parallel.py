"""Lightning attention over sequences that are cut into contiguous slices, one per rank (Ling-2.6 report).

With a constant decay, what the tokens before a slice leave for it is one [D, D] state per head, and merging states needs nothing
but a power of the decay. For a document that enters rank r, with S_s the state its tokens on rank s alone build up,

    S_in(r) = sum over s < r of lam^(start_r - end_s) S_s            o_i += scale lam^(i + 1) q_i S_in(r)

so one all-gather of states serves the forward pass. Backward is the same in reverse: G_s is the gradient that rank s alone has
for the state before its slice,

    dS_out(r) = sum over s > r of lam^(start_s - end_r) G_s          dk_i += lam^(n - 1 - i) v_i dS_out^T,  dv_i alike

Two orders. In a group as large as one machine the all-gather is short: it is waited for, and what enters is the local attention's
initial state. In a larger group it runs beside the local attention, which starts from nothing; what enters is added afterwards.

Contiguous slices balance the work by themselves: a token costs the same wherever it stands, so there is no causal triangle
for a zigzag order to even out. Shapes: B rows, T local tokens, H heads, D head dim, N pieces of documents on this rank,
M states that cross a boundary of ranks (B rows, or 1 for a packed row), P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from openling.ops.lightning import lightning
from openling.ops.pick import kernels_for

# Ranks up to which waiting for the states costs less than adding what they bring: one machine with a fast network between GPUs.
WAITING_RANKS = 8


@dataclass(frozen=True)
class ContextSlice:
    """What one rank holds, and which other ranks hold the rest of the documents that cross its two ends.

    Made once per batch by `context_slice`, used by every layer: all that the op must know on the host is here.
    """

    rank: int
    start: int
    """Position of the first local token in the whole sequence; its last is at `end - 1`."""
    end: int
    documents: tuple[int, ...]
    """Which document each local piece belongs to; documents without a token here are left out. Empty if not packed."""
    cu_seqlens: Tensor | None
    """Bounds [N + 1] of the pieces in local tokens, on the device; None if not packed."""
    first_tokens: int
    """Tokens of the first piece, which may go on from earlier ranks."""
    last_tokens: int
    """Tokens of the last piece, which may go on into later ranks."""
    before: slice
    """The earlier ranks with tokens of the first piece's document."""
    after: slice
    """The later ranks with tokens of the last piece's document."""
    distance_before: Tensor
    """Tokens between the end of each rank in `before` and this slice."""
    distance_after: Tensor
    """Tokens between this slice and the start of each rank in `after`."""


def context_slice(
    bounds: Sequence[int],
    rank: int,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> ContextSlice:
    """The slice of `rank`: it holds tokens bounds[rank] to bounds[rank + 1] of the whole sequence, which may be none.

    cu_seqlens: bounds [documents + 1] in the whole sequence where one row packs documents, the same on every rank. Give it on the
    CPU: from a GPU it has to be waited for.
    """
    bounds = [int(x) for x in bounds]
    documents = None if cu_seqlens is None else [int(x) for x in cu_seqlens]
    _check(bounds, rank, documents)
    start, end = bounds[rank], bounds[rank + 1]

    def made(pieces: list[tuple[int, int, int]], before: slice, after: slice) -> ContextSlice:
        local = None if documents is None else [0, *(b - start for _, _, b in pieces)]
        return ContextSlice(
            rank=rank,
            start=start,
            end=end,
            documents=tuple(document for document, _, _ in pieces),
            cu_seqlens=None if local is None else torch.tensor(local, dtype=torch.int32, device=device),
            first_tokens=end - start if local is None else local[1] if pieces else 0,
            last_tokens=end - start if local is None else local[-1] - local[-2] if pieces else 0,
            before=before,
            after=after,
            distance_before=torch.tensor([start - bounds[s + 1] for s in _ranks(before)], dtype=torch.float64, device=device),
            distance_after=torch.tensor([bounds[s] - end for s in _ranks(after)], dtype=torch.float64, device=device),
        )

    nobody = slice(rank, rank), slice(rank + 1, rank + 1)
    if documents is None:
        return made([], slice(0, rank), slice(rank + 1, len(bounds) - 1))
    spans = list(zip(documents[:-1], documents[1:], strict=True))
    pieces = [(d, max(a, start), min(b, end)) for d, (a, b) in enumerate(spans) if max(a, start) < min(b, end)]
    if not pieces:
        return made([], *nobody)
    opened, closed = spans[pieces[0][0]][0], spans[pieces[-1][0]][1]
    first = next(s for s in range(rank + 1) if s == rank or bounds[s + 1] > opened)
    last = next(s for s in reversed(range(rank, len(bounds) - 1)) if s == rank or bounds[s] < closed)
    return made(pieces, slice(first, rank), slice(rank + 1, last + 1))


def _ranks(ranks: slice) -> range:
    return range(ranks.start, ranks.stop)


def _check(bounds: list[int], rank: int, documents: list[int] | None) -> None:
    if bounds[0] != 0 or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"the bounds of the ranks must rise from 0, got {bounds}")
    if not 0 <= rank < len(bounds) - 1:
        raise ValueError(f"rank {rank} is none of the {len(bounds) - 1} that the bounds {bounds} describe")
    rises = documents is None or all(a <= b for a, b in zip(documents, documents[1:], strict=False))
    if documents is not None and (not rises or documents[0] != 0 or documents[-1] != bounds[-1]):
        raise ValueError(f"cu_seqlens must rise from 0 to {bounds[-1]}, the end of the last rank, got {documents}")


def lightning_context_parallel(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    log_decay_H: Tensor,
    held: ContextSlice,
    *,
    group: dist.ProcessGroup | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lightning` for the local slice of a sequence: local output [B, T, H, D] and states FP32 [N or B, H, D, D].

    The states are those after each piece's last local token, so the final state of a document is on the rank where it ends, of
    rows that are not packed on the last rank. An initial state is for rows that are not packed and is given on rank 0 alone.
    Every rank of the group must call this, and run backward if any does; each direction issues one all-gather.
    """
    if dist.get_rank(group) != held.rank:
        raise ValueError(f"the slice of rank {held.rank} was given to rank {dist.get_rank(group)} of the group")
    if q_BTHD.shape[1] != held.end - held.start:
        raise ValueError(f"rank {held.rank} holds {held.end - held.start} tokens, got {q_BTHD.shape[1]}")
    if initial_state is not None and (held.rank != 0 or held.cu_seqlens is not None):
        raise ValueError("an initial state belongs to rank 0 and to rows that are not packed")
    if log_decay_H.requires_grad:
        raise ValueError("log_decay is a constant here: no gradient is computed for it")
    return _ContextLightning.apply(q_BTHD, k_BTHD, v_BTHD, log_decay_H, initial_state, held, group)


class _ContextLightning(torch.autograd.Function):
    """Forward and backward as in this module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay_H: Tensor,
        initial_MHDD: Tensor | None,
        held: ContextSlice,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        decay_H = log_decay_H.to(device=q.device, dtype=_state_dtype(q))
        built_MHDD = state_after(_last(k, held), _last(v, held), decay_H)
        if initial_MHDD is not None:
            built_MHDD = built_MHDD + _faded(initial_MHDD, held.last_tokens, decay_H)
        gathered = _Gather(built_MHDD, group)
        ctx.waits = dist.get_world_size(group) <= WAITING_RANKS
        if ctx.waits:
            entering_MHDD = gathered.folded(held.before, held.distance_before, decay_H)
            out, states = _local(q, k, v, log_decay_H, initial_MHDD if entering_MHDD is None else entering_MHDD, held)
        else:
            out, states = _local(q, k, v, log_decay_H, initial_MHDD, held)
            entering_MHDD = gathered.folded(held.before, held.distance_before, decay_H)
            if entering_MHDD is not None:
                scale = q.shape[-1] ** -0.5
                add_carried(_first(out, held), _first(q, held), entering_MHDD * scale, decay_H, from_start=True)
                _first_state(states, held).add_(_faded(entering_MHDD, held.first_tokens, decay_H))
        ctx.save_for_backward(q, k, v, log_decay_H, initial_MHDD, entering_MHDD)
        ctx.held, ctx.group = held, group
        ctx.set_materialize_grads(False)
        return out, states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay_H, initial_MHDD, entering_MHDD = ctx.saved_tensors
        held: ContextSlice = ctx.held
        decay_H = log_decay_H.to(device=q.device, dtype=_state_dtype(q))
        dout = torch.zeros_like(v, dtype=q.dtype) if grads[0] is None else grads[0]
        dstates = grads[1]
        wanted_MHDD = state_before(_first(q, held), _first(dout, held), decay_H) * q.shape[-1] ** -0.5
        if dstates is not None and (held.first_tokens or held.cu_seqlens is None):
            wanted_MHDD = wanted_MHDD + _faded(_first_state(dstates, held), held.first_tokens, decay_H)
        gathered = _Gather(wanted_MHDD, ctx.group)
        first_MHDD = initial_MHDD if entering_MHDD is None else entering_MHDD
        if ctx.waits:
            leaving_MHDD = gathered.folded(held.after, held.distance_after, decay_H)
            if leaving_MHDD is not None:
                dstates = _with_last(dstates, leaving_MHDD, held)
            dq, dk, dv, dinitial = _local_gradients(q, k, v, log_decay_H, first_MHDD, held, dout, dstates)
        else:
            dq, dk, dv, dinitial = _local_gradients(q, k, v, log_decay_H, first_MHDD, held, dout, dstates)
            leaving_MHDD = gathered.folded(held.after, held.distance_after, decay_H)
            if leaving_MHDD is not None:
                last_k, last_v = _last(k, held), _last(v, held)
                add_carried(_last(dk, held), last_v, leaving_MHDD.transpose(-1, -2), decay_H, from_start=False)
                add_carried(_last(dv, held), last_k, leaving_MHDD, decay_H, from_start=False)
                if initial_MHDD is not None:
                    dinitial = dinitial + _faded(leaving_MHDD, held.last_tokens, decay_H)
        return dq, dk, dv, None, None if initial_MHDD is None else dinitial, None, None


class _Gather:
    """One all-gather under way."""

    def __init__(self, state_MHDD: Tensor, group: dist.ProcessGroup | None) -> None:
        self._mine = state_MHDD.contiguous()  # kept until the collective has read it
        shape = (dist.get_world_size(group), *state_MHDD.shape)
        self._all_PMHDD = torch.empty(shape, dtype=state_MHDD.dtype, device=state_MHDD.device)
        # torch 2.13 gave the same function another name.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._work = all_gather(self._all_PMHDD.flatten(0, 1), self._mine, group=group, async_op=True)

    def folded(self, ranks: slice, distance: Tensor, decay_H: Tensor) -> Tensor | None:
        """Waits; then the states of these ranks, faded by their distance and summed. None if there are none."""
        self._work.wait()
        if ranks.start == ranks.stop:
            return None
        faded_PH = torch.exp(decay_H * distance.to(decay_H.dtype)[:, None])
        return (self._all_PMHDD[ranks] * faded_PH[:, None, :, None, None]).sum(0)


def state_after(k_BTHD: Tensor, v_BTHD: Tensor, decay_H: Tensor) -> Tensor:
    """What these tokens alone leave behind them: sum of lam^(T - 1 - i) k_i^T v_i, [B, H, D, D]."""
    kernels = _kernels_for(k_BTHD)
    if kernels is not None:
        return kernels.row_states(k_BTHD, v_BTHD, decay_H, reverse=False)
    return _weighted_outer(k_BTHD, v_BTHD, _weights(k_BTHD.shape[1], decay_H, from_start=False))


def state_before(q_BTHD: Tensor, dout_BTHD: Tensor, decay_H: Tensor) -> Tensor:
    """The gradient these tokens alone have for the state before them, unscaled: sum of lam^(i + 1) q_i^T dout_i."""
    kernels = _kernels_for(q_BTHD)
    if kernels is not None:
        return kernels.row_states(q_BTHD, dout_BTHD, decay_H, reverse=True)
    return _weighted_outer(q_BTHD, dout_BTHD, _weights(q_BTHD.shape[1], decay_H, from_start=True))


def add_carried(into_BTHD: Tensor, x_BTHD: Tensor, state_BHDD: Tensor, decay_H: Tensor, *, from_start: bool) -> None:
    """into_i += w_i x_i S in place, with w_i = lam^(i + 1) from the start of the tokens or lam^(T - 1 - i) towards their end."""
    weights_HT = _weights(x_BTHD.shape[1], decay_H, from_start=from_start)
    with torch.autocast(x_BTHD.device.type, enabled=False):
        carried_BHTD = (x_BTHD.transpose(1, 2).to(decay_H.dtype) * weights_HT[..., None]) @ state_BHDD
    into_BTHD.copy_(into_BTHD + carried_BHTD.transpose(1, 2))


def _weights(tokens: int, decay_H: Tensor, *, from_start: bool) -> Tensor:
    position_T = torch.arange(tokens, device=decay_H.device, dtype=decay_H.dtype)
    age_T = position_T + 1 if from_start else tokens - 1 - position_T
    return torch.exp(decay_H[:, None] * age_T)


def _weighted_outer(a_BTHD: Tensor, b_BTHD: Tensor, weights_HT: Tensor) -> Tensor:
    with torch.autocast(a_BTHD.device.type, enabled=False):
        a_BHTD, b_BHTD = (x.transpose(1, 2).to(weights_HT.dtype) for x in (a_BTHD, b_BTHD))
        return (a_BHTD * weights_HT[..., None]).transpose(-1, -2) @ b_BHTD


def _local(
    q: Tensor, k: Tensor, v: Tensor, log_decay_H: Tensor, initial: Tensor | None, held: ContextSlice
) -> tuple[Tensor, Tensor]:
    """Attention among the local tokens, from what is known of the state before them."""
    if initial is not None or held.start == held.end:
        initial = _beginning(q, v, initial, held)
    if held.start == held.end:
        assert initial is not None
        return torch.empty_like(v, dtype=q.dtype), initial
    return lightning(q, k, v, log_decay_H, initial_state=initial, cu_seqlens=held.cu_seqlens)


def _local_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay_H: Tensor,
    first_MHDD: Tensor | None,
    held: ContextSlice,
    dout: Tensor,
    dstates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the state before the first piece, as far as they come from local outputs and states.

    The state that enters is known by now, so dq is complete here; dk and dv may lack what later ranks want.
    """
    initial = _beginning(q, v, first_MHDD, held)
    if held.start == held.end:
        nothing = torch.zeros_like(initial) if dstates is None else dstates
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), nothing
    kernels = _kernels_for(q)
    if kernels is not None:  # no need to run the forward pass again
        scale = q.shape[-1] ** -0.5
        dq, dk, dv, dinitial = kernels.lightning_backward(dout, dstates, q, k, v, log_decay_H, initial, held.cu_seqlens, scale)
        return dq, dk, dv, _first_state(dinitial, held)
    q, k, v, initial = (x.detach().requires_grad_() for x in (q, k, v, initial))
    with torch.enable_grad():
        outputs = lightning(q, k, v, log_decay_H, initial_state=initial, cu_seqlens=held.cu_seqlens)
    given = (dout,) if dstates is None else (dout, dstates)
    dq, dk, dv, dinitial = torch.autograd.grad(outputs[: len(given)], (q, k, v, initial), given)
    return dq, dk, dv, _first_state(dinitial, held)


def _beginning(q: Tensor, v: Tensor, first_MHDD: Tensor | None, held: ContextSlice) -> Tensor:
    """The states [N, H, D, D] that the local pieces begin with: the first piece's, and zeros."""
    pieces = q.shape[0] if held.cu_seqlens is None else len(held.documents)
    initial = torch.zeros((pieces, q.shape[2], q.shape[3], v.shape[3]), dtype=_state_dtype(q), device=q.device)
    if first_MHDD is not None:
        _first_state(initial, held).copy_(first_MHDD)
    return initial


def _with_last(dstates: Tensor | None, leaving_MHDD: Tensor, held: ContextSlice) -> Tensor:
    """Gradients [N, H, D, D] of the states behind the pieces, with what later ranks want of the last piece's."""
    if held.cu_seqlens is None:
        return leaving_MHDD if dstates is None else dstates + leaving_MHDD
    pieces = len(held.documents)
    wanted = leaving_MHDD.new_zeros((pieces, *leaving_MHDD.shape[1:])) if dstates is None else dstates.clone()
    wanted[-1:] += leaving_MHDD
    return wanted


def _kernels_for(x: Tensor) -> ModuleType | None:
    return kernels_for(x) if x.dtype == torch.bfloat16 and x.shape[-1] <= 128 and x.shape[1] else None


def _faded(state_MHDD: Tensor, tokens: int, decay_H: Tensor) -> Tensor:
    return state_MHDD * torch.exp(decay_H * tokens)[:, None, None]


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _first(x_BTHD: Tensor, held: ContextSlice) -> Tensor:
    return x_BTHD[:, : held.first_tokens]


def _last(x_BTHD: Tensor, held: ContextSlice) -> Tensor:
    return x_BTHD[:, x_BTHD.shape[1] - held.last_tokens :]


def _first_state(states_NHDD: Tensor, held: ContextSlice) -> Tensor:
    """The states of the first piece; of rows that are not packed, all."""
    return states_NHDD if held.cu_seqlens is None else states_NHDD[:1]
