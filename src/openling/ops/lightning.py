"""Lightning attention: linear attention with one constant decay per head (Ling-2.6 report, section 2; arXiv 2401.04658).

    S_t = exp(g_h) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

`lightning_recurrent` is the definition, token by token. `lightning_chunk` is the same function in matrix form, which
training and prefill use. Shapes: B batch, T tokens, H heads, D head dim, N documents, C chunk length, n chunks.
With `cu_seqlens` the batch holds one row of N packed documents and states are [N, H, D, D].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from openling.ops.cpu import matmul_dtype
from openling.ops.pick import kernels_for
from openling.ops.rows import exp_rows

CHUNK = 64


def decay_slopes(num_heads: int) -> list[float]:
    """Base slopes b_h > 0 (ALiBi's): powers of 2^(-8/H), interpolated when H is not a power of two."""
    if math.log2(num_heads).is_integer():
        return [2.0 ** (-8.0 * (h + 1) / num_heads) for h in range(num_heads)]
    lower = 2 ** math.floor(math.log2(num_heads))
    return decay_slopes(lower) + decay_slopes(2 * lower)[0::2][: num_heads - lower]


def log_decay(num_heads: int, layer: int, num_layers: int, offset: int = 0) -> Tensor:
    """Log-decay g_h < 0 of one layer, float32 [H]: g_h = -b_h (1 - (layer - offset)/(L - 1) + 1e-5), factor 1 + 1e-5 if L = 1."""
    depth = 1.0 + 1e-5 if num_layers <= 1 else 1.0 - (layer - offset) / (num_layers - 1) + 1e-5
    return torch.tensor([-slope * depth for slope in decay_slopes(num_heads)], dtype=torch.float32)


@cache
def log_decay_on(device: torch.device, num_heads: int, layer: int, num_layers: int, offset: int = 0) -> Tensor:
    """`log_decay` kept on a device: made once, so that no step of training or decoding waits for a copy."""
    with torch.inference_mode(False):
        return log_decay(num_heads, layer, num_layers, offset).to(device)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _document_bounds(q_BTHD: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """Start and end of each document in the flattened [B*T] token order."""
    batch, tokens = q_BTHD.shape[:2]
    if cu_seqlens is None:
        return [(row * tokens, (row + 1) * tokens) for row in range(batch)]
    bounds = [int(x) for x in cu_seqlens]
    if batch != 1 or bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens} over one packed row, got {bounds} with batch {batch}")
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _first_state(q_BTHD: Tensor, documents: int, initial_NHDD: Tensor | None, value_dim: int) -> Tensor:
    heads, dim = q_BTHD.shape[2:]
    shape = (documents, heads, dim, value_dim)
    if initial_NHDD is None:
        return torch.zeros(shape, dtype=_compute_dtype(q_BTHD), device=q_BTHD.device)
    if tuple(initial_NHDD.shape) != shape:
        raise ValueError(f"initial state must be {list(shape)}, got {list(initial_NHDD.shape)}")
    return initial_NHDD.to(_compute_dtype(q_BTHD))


def lightning_recurrent(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    log_decay_H: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: one token at a time. Returns output [B, T, H, D] and final states [N, H, D, D] in FP32 (or FP64)."""
    dtype = _compute_dtype(q_BTHD)
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    documents = _document_bounds(q_BTHD, cu_seqlens)
    state_NHDD = _first_state(q_BTHD, len(documents), initial_state, v_BTHD.shape[-1])
    q, k, v = (x.flatten(0, 1).to(dtype) for x in (q_BTHD, k_BTHD, v_BTHD))
    decay_H11 = log_decay_H.to(device=q.device, dtype=dtype).exp()[:, None, None]
    rows: list[Tensor] = []
    states: list[Tensor] = []
    for document, (start, end) in enumerate(documents):
        state_HDD = state_NHDD[document]
        for t in range(start, end):
            state_HDD = decay_H11 * state_HDD + k[t, :, :, None] * v[t, :, None, :]
            rows.append(scale * torch.einsum("hd,hde->he", q[t], state_HDD))
        states.append(state_HDD)
    out = torch.stack(rows) if rows else v[:0]
    return out.view_as(v_BTHD).to(q_BTHD.dtype), torch.stack(states)


def lightning_chunk(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    log_decay_H: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The chunk form of `lightning_recurrent`: same arguments, same results, matrix products instead of a token loop."""
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    documents = _document_bounds(q_BTHD, cu_seqlens)
    state_NHDD = _first_state(q_BTHD, len(documents), initial_state, v_BTHD.shape[-1])
    layout = _ChunkLayout(documents, chunk, q_BTHD.device)
    q, k, v = (layout.split(x.flatten(0, 1)) for x in (q_BTHD, k_BTHD, v_BTHD))  # [n, H, C, D]
    out_nHCD, final_NHDD = _ChunkForm.apply(q, k, v, state_NHDD, log_decay_H, layout, scale)
    return layout.join(out_nHCD).view_as(v_BTHD).to(q_BTHD.dtype), final_NHDD


class _ChunkForm(torch.autograd.Function):
    """Chunks q, k [n, H, C, D], v [n, H, C, E] and first states [N, H, D, E] to outputs [n, H, C, E] and last states.

    With W_ij = scale lam^(i - j) for j up to i, c_i = scale lam^(i + 1), f_j = lam^(length - 1 - j), X * w scaling rows of X:

        P = (Q K^T) W elementwise      O = P V + (Q S) * c      A = (K * f)^T V      S_next = lam^length S + A

    Products of BF16 inputs run in BF16 where a CPU is faster so; the state and what is added to it are FP32 always.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, first_NHDE: Tensor, log_decay_H: Tensor, layout: _ChunkLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        heads, wide = q.shape[1], first_NHDE.dtype
        dtype = matmul_dtype(q.dtype) if q.dtype == k.dtype == v.dtype and not q.is_cuda else wide
        with torch.autocast(q.device.type, enabled=False):
            within_HCC, carried_HC1, fading_nHC1, kept_nH11 = _decays(log_decay_H, layout, scale, first_NHDE)
            q, k, v = (_rows(x, dtype) for x in (q, k, v))  # [n * H, C, D]
            score = torch.bmm(q, k.transpose(1, 2))
            score.unflatten(0, (-1, heads)).mul_(within_HCC.to(dtype))
            faded = k.unflatten(0, (-1, heads)) * fading_nHC1
            added = torch.bmm(faded.flatten(0, 1).transpose(1, 2), v.to(wide))
            before_nHDE, last_NHDE = _scan(layout, added.unflatten(0, (-1, heads)), kept_nH11, first_NHDE)
            before = before_nHDE.to(dtype).flatten(0, 1)
            out = torch.bmm(score, v).unflatten(0, (-1, heads))
            out.addcmul_(torch.bmm(q, before).view_as(out), carried_HC1.to(dtype))
        ctx.save_for_backward(q, k, v, score, before, within_HCC, carried_HC1, fading_nHC1, kept_nH11)
        ctx.layout = layout
        return out, last_NHDE

    @staticmethod
    def backward(ctx: Any, dout_nHCE: Tensor, dlast_NHDE: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, score, before, within_HCC, carried_HC1, fading_nHC1, kept_nH11 = ctx.saved_tensors
        heads, dtype, wide = within_HCC.shape[0], q.dtype, kept_nH11.dtype
        carried, fading = carried_HC1.to(dtype), fading_nHC1.to(dtype)
        with torch.autocast(q.device.type, enabled=False):
            dout = _rows(dout_nHCE, dtype)
            dscore = torch.bmm(dout, v.transpose(1, 2))
            dscore.unflatten(0, (-1, heads)).mul_(within_HCC.to(dtype))
            dq, dk, dv = torch.bmm(dscore, k), torch.bmm(dscore.transpose(1, 2), q), torch.bmm(score.transpose(1, 2), dout)
            dq, dk, dv, dout, k, v = (x.unflatten(0, (-1, heads)) for x in (dq, dk, dv, dout, k, v))
            dq.addcmul_(torch.bmm(dout.flatten(0, 1), before.transpose(1, 2)).view_as(dq), carried)
            read = torch.bmm(q.transpose(1, 2), (dout * carried).flatten(0, 1)).to(wide)
            after_nHDE, dfirst_NHDE = _scan(ctx.layout, read.unflatten(0, (-1, heads)), kept_nH11, dlast_NHDE, reverse=True)
            after = after_nHDE.to(dtype).flatten(0, 1)
            dk.addcmul_(torch.bmm(v.flatten(0, 1), after.transpose(1, 2)).view_as(dk), fading)
            dv += torch.bmm((k * fading).flatten(0, 1), after).view_as(dv)
        return dq, dk, dv, dfirst_NHDE, None, None, None


def _rows(x_nHCD: Tensor, dtype: torch.dtype) -> Tensor:
    """[n * H, C, D], packed: a batched product of anything else would make its own, slower copies."""
    packed = (
        x_nHCD if x_nHCD.dtype == dtype and x_nHCD.is_contiguous() else x_nHCD.new_empty(x_nHCD.shape, dtype=dtype).copy_(x_nHCD)
    )
    return packed.flatten(0, 1)


def _decays(log_decay_H: Tensor, layout: _ChunkLayout, scale: float, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W [H, C, C], c [H, C, 1], f [1 or n, H, C, 1] and lam^length [1 or n, H, 1, 1] of `_ChunkForm`.

    Only differences of positions are exponentiated, and they are never positive: no decay can overflow.
    """
    g_H = log_decay_H.to(device=like.device, dtype=like.dtype)
    position_C = torch.arange(layout.chunk, device=like.device, dtype=like.dtype)
    age_CC = position_C[:, None] - position_C[None, :]
    within_HCC = scale * exp_rows(g_H[:, None, None] * age_CC.clamp(min=0)).tril()
    carried_HC1 = scale * exp_rows(g_H[:, None] * (position_C + 1))[..., None]
    lengths_n1 = layout.lengths_n[: 1 if layout.dense else None, None].to(like.dtype)
    # Rows behind a shorter chunk's end are zero in k, so what their clamped exponent gives does not matter.
    remaining_nC = (lengths_n1 - 1 - position_C).clamp(min=0)
    fading_nHC1 = exp_rows(g_H[:, None] * remaining_nC[:, None, :])[..., None]
    return within_HCC, carried_HC1, fading_nHC1, exp_rows(g_H * lengths_n1)[..., None, None]


class _ChunkLayout:
    """Cuts documents into chunks that never cross a boundary; the last chunk of a document is padded with zeros."""

    def __init__(self, documents: list[tuple[int, int]], chunk: int, device: torch.device) -> None:
        pieces = [(d, s, min(s + chunk, end)) for d, (start, end) in enumerate(documents) for s in range(start, end, chunk)]
        self.lengths_n = torch.tensor([end - start for _, start, end in pieces], device=device, dtype=torch.long)
        starts_n = torch.tensor([start for _, start, _ in pieces], device=device, dtype=torch.long)
        offset_C = torch.arange(chunk, device=device)
        self.valid_nC = offset_C < self.lengths_n[:, None]
        self.token_nC = torch.where(self.valid_nC, starts_n[:, None] + offset_C, 0)
        self.place_T = self.valid_nC.flatten().nonzero()[:, 0]  # documents and their chunks are in order
        self.dense = bool((self.lengths_n == chunk).all())
        self.chunk = chunk
        self.chunks_of = [-(-(end - start) // chunk) for start, end in documents]

    def runs(self) -> Iterator[tuple[slice, slice, int]]:
        """Documents that advance together, their chunks, and how many each has: all of a batch at once, packed ones singly."""
        if len(set(self.chunks_of)) == 1:
            yield slice(None), slice(None), self.chunks_of[0]
            return
        start = 0
        for i, count in enumerate(self.chunks_of):
            yield slice(i, i + 1), slice(start, start + count), count
            start += count

    def split(self, x_THD: Tensor) -> Tensor:
        """Tokens [B*T, H, D] to chunks [n, H, C, D]."""
        if self.dense:
            n, chunk = self.token_nC.shape
            return x_THD.view(n, chunk, *x_THD.shape[1:]).transpose(1, 2)
        gathered: Tensor = _Cut.apply(x_THD, self.token_nC, self.valid_nC, self.place_T)
        return gathered.transpose(1, 2)

    def join(self, x_nHCD: Tensor) -> Tensor:
        """Chunks back to tokens, padding dropped."""
        x_nCHD = x_nHCD.transpose(1, 2)
        if self.dense:
            return x_nCHD.flatten(0, 1)
        joined: Tensor = _Joined.apply(x_nCHD, self.token_nC, self.valid_nC, self.place_T)
        return joined


def _cut(x_THD: Tensor, token_nC: Tensor, valid_nC: Tensor) -> Tensor:
    rows = x_THD.index_select(0, token_nC.flatten()).unflatten(0, token_nC.shape)
    return rows.masked_fill_(~valid_nC[..., None, None], 0)


def _joined(x_nCHD: Tensor, place_T: Tensor) -> Tensor:
    return x_nCHD.flatten(0, 1).index_select(0, place_T)


class _Cut(torch.autograd.Function):
    """Tokens to padded chunks. Its gradient gathers, as it does: PyTorch's gradient of an index adds row by row."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, token_nC: Tensor, valid_nC: Tensor, place_T: Tensor) -> Tensor:
        ctx.save_for_backward(place_T)
        return _cut(x_THD, token_nC, valid_nC)

    @staticmethod
    def backward(ctx: Any, grad_nCHD: Tensor) -> tuple[Tensor | None, ...]:
        return _joined(grad_nCHD, *ctx.saved_tensors), None, None, None


class _Joined(torch.autograd.Function):
    """The way back."""

    @staticmethod
    def forward(ctx: Any, x_nCHD: Tensor, token_nC: Tensor, valid_nC: Tensor, place_T: Tensor) -> Tensor:
        ctx.save_for_backward(token_nC, valid_nC)
        return _joined(x_nCHD, place_T)

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        return _cut(grad_THD, *ctx.saved_tensors), None, None, None


def _scan(
    layout: _ChunkLayout, added_nHDE: Tensor, kept_nH11: Tensor, first_NHDE: Tensor, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """State = kept * state + added, chunk by chunk of each document: the state before every chunk, and after the last.

    `reverse`: from the last chunk to the first, as gradients of states run.
    """
    met_nHDE, last_NHDE = torch.empty_like(added_nHDE), first_NHDE.clone()
    kept_nH11 = kept_nH11.expand(added_nHDE.shape[0], -1, -1, -1)
    for documents, chunks, count in layout.runs():
        if count:
            added, kept, met = (x[chunks].unflatten(0, (-1, count)) for x in (added_nHDE, kept_nH11, met_nHDE))
            order = list(range(count))[:: -1 if reverse else 1]
            met[:, order[0]] = first_NHDE[documents]
            for here, there in pairwise(order):
                torch.addcmul(added[:, here], kept[:, here], met[:, here], out=met[:, there])
            end = order[-1]
            last_NHDE[documents] = torch.addcmul(added[:, end], kept[:, end], met[:, end])
    return met_nHDE, last_NHDE


def lightning(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    log_decay_H: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """The op's one entry: a single token takes one step of the recurrence, anything longer the chunk form or its kernels.

    Arguments and results as `lightning_recurrent`; without `return_state` the final states are left undefined. The kernels
    serve BF16 (or whatever autocast makes BF16) on GPUs, keep the state in FP32 and round each matrix operand to BF16.
    """
    if q_BTHD.shape[1] == 1 and cu_seqlens is None:
        return _step(q_BTHD, k_BTHD, v_BTHD, log_decay_H, initial_state)
    device = q_BTHD.device.type
    if device == "cuda" and torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        q_BTHD, k_BTHD, v_BTHD = q_BTHD.to(low), k_BTHD.to(low), v_BTHD.to(low)
    kernels = kernels_for(q_BTHD) if q_BTHD.dtype == torch.bfloat16 and max(q_BTHD.shape[-1], v_BTHD.shape[-1]) <= 128 else None
    if kernels is not None:
        scale = q_BTHD.shape[-1] ** -0.5
        return kernels.lightning_forward(q_BTHD, k_BTHD, v_BTHD, log_decay_H, initial_state, cu_seqlens, scale, return_state)
    return lightning_chunk(q_BTHD, k_BTHD, v_BTHD, log_decay_H, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay_H: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One decode step for a whole batch: B1HD in, B1HD out."""
    device = q.device.type  # entering a context takes as long as a small product: only where it does something
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        dtype = _compute_dtype(q)
        state_BHDD = _first_state(q, q.shape[0], state, v.shape[-1])
        q_BHD, k_BHD, v_BHD = (x[:, 0].to(dtype) for x in (q, k, v))
        decay = log_decay_H.to(device=q.device, dtype=dtype).exp()[:, None, None]
        state_BHDD = torch.addcmul(decay * state_BHDD, k_BHD[..., :, None], v_BHD[..., None, :])
        out = (q_BHD[..., None, :] @ state_BHDD) * q.shape[-1] ** -0.5
        return out.transpose(1, 2).to(q.dtype), state_BHDD
