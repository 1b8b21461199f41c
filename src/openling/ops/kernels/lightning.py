"""Lightning attention on GPUs, forward and backward; twin: `openling.ops.lightning.lightning_chunk`.

One scan does all four passes. With a constant decay lam = exp(g) per head,

    out_i = sum over j up to i of lam^|i - j| (a_i . b_j) c_j  +  lam^(distance) a_i S

is the forward pass for (a, b, c) = (q, k, v); dq is the same scan with (dO, v, k) and the state transposed; dk is it backwards
in time with (v, dO, q), and dv backwards with (k, q, dO). A program owns one head of one sequence and a block of output
columns and walks the chunks with its part of the state in registers: no state is ever written per chunk, and as every value
has one owner, results are bitwise repeatable. The programs of one head read the same rows at about the same time, so that all
but the first find them in the L2 cache.

This file holds the portable form and what both forms share; `lightning_hopper.py` is the form for Hopper GPUs.
Least bytes per token and head at D = 128 in BF16: forward 1024, each of the three gradients 1024.
Legend: B batch, T tokens, H heads, D head dim (K of queries and keys, V of values), N documents, C tokens of a chunk.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from openling.ops.kernels.lightning_pieces import COLUMNS, Pieces, cut, incoming_states, padded, piece_length, whole_rows
from openling.ops.pick import batch_invariant

LOG2_E = 1.4426950408889634
CHUNK = 64
# Pieces that a whole row's state is summed in: enough to fill a GPU, few enough that carrying them on costs little.
ROW_PIECES, ROW_PIECE = 8, 512


@triton.jit
def scan_kernel(
    a, b, c, out, initial, final, log2_decay, bounds, a_stride, b_stride, c_stride, state_row, state_column, tokens, heads, scale,
    A: tl.constexpr, WIDTH: tl.constexpr, A_PAD: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (column blocks of the output, heads, sequences). Strides are elements from one token to the next.

    Forward in time the state is taken before a chunk, so a token of rank r (its place in time within the chunk) reads it with
    lam^(r + 1). In reverse it is the gradient at the chunk's last token, read with lam^r. The scale multiplies what is read
    going forward and what is added in reverse, so that states given from outside mean the same in both directions.
    """
    head, n = tl.program_id(1), tl.program_id(2)
    if PACKED:
        first = tl.load(bounds + n).to(tl.int64)
        length = (tl.load(bounds + n + 1) - first).to(tl.int32)
    else:
        first = n.to(tl.int64) * tokens
        length = tokens
    g = tl.load(log2_decay + head)
    row = tl.arange(0, CHUNK)
    column_a = tl.arange(0, A_PAD)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    age = row[None, :] - row[:, None] if REVERSE else row[:, None] - row[None, :]
    within = tl.where(age >= 0, tl.exp2(g * tl.maximum(age, 0)) * scale, 0.0)
    lead: tl.constexpr = 0 if REVERSE else 1
    state_at = (n.to(tl.int64) * heads + head) * (A * WIDTH) + column_a[:, None] * state_row + column[None, :] * state_column
    state_mask = (column_a < A)[:, None] & (column < WIDTH)[None, :]
    if HAS_INITIAL:
        state = tl.load(initial + state_at, mask=state_mask, other=0.0)
    else:
        state = tl.zeros((A_PAD, COLUMNS), tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for step in range(chunks):
        start = (chunks - 1 - step if REVERSE else step) * CHUNK
        live = tl.minimum(length - start, CHUNK)
        token = (first + start + row)[:, None]
        a_mask = (row < live)[:, None] & (column_a < A)[None, :]
        c_mask = (row < live)[:, None] & (column < WIDTH)[None, :]
        a_tile = tl.load(a + token * a_stride + head * A + column_a[None, :], mask=a_mask, other=0.0)
        b_tile = tl.load(b + token * b_stride + head * A + column_a[None, :], mask=a_mask, other=0.0)
        c_tile = tl.load(c + token * c_stride + head * WIDTH + column[None, :], mask=c_mask, other=0.0)
        rank = tl.maximum(live - 1 - row if REVERSE else row, 0)
        read = tl.exp2(g * (rank + lead)) * (1.0 if REVERSE else scale)
        added = tl.exp2(g * tl.maximum(live - lead - rank, 0)) * (scale if REVERSE else 1.0)
        answer = tl.dot(a_tile, state.to(a_tile.dtype), input_precision=PRECISION) * read[:, None]
        weights = (tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION) * within).to(c_tile.dtype)
        answer = tl.dot(weights, c_tile, answer, input_precision=PRECISION)
        faded = (c_tile * added[:, None]).to(c_tile.dtype)
        state = tl.dot(tl.trans(b_tile), faded, state * tl.exp2(g * live), input_precision=PRECISION)
        out_at = token * (heads * WIDTH) + head * WIDTH + column[None, :]
        tl.store(out + out_at, answer.to(out.dtype.element_ty), mask=c_mask)
    if HAS_FINAL:
        tl.store(final + state_at, state, mask=state_mask)


@cache
def _hopper() -> ModuleType | None:
    """The Hopper form, where there is such a GPU and this Triton carries what it is written in."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return None
    try:
        from openling.ops.kernels import lightning_hopper
    except ImportError as error:
        logging.getLogger("openling").warning("Lightning runs in its portable form, at a third of the speed: %s", error)
        return None
    return lightning_hopper


def _flat(x_BTHD: Tensor) -> Tensor:
    """x as rows [B*T, H*D], evenly spaced and 16-byte aligned: a view where it has that form, else a copy."""
    batch, tokens, heads, dim = x_BTHD.shape
    row = x_BTHD.stride(1)
    together = x_BTHD.stride(3) == 1 and (heads == 1 or x_BTHD.stride(2) == dim)
    even = (tokens > 1 or batch == 1) and row >= heads * dim and (batch == 1 or x_BTHD.stride(0) == tokens * row)
    aligned = row * x_BTHD.element_size() % 16 == 0 and x_BTHD.data_ptr() % 16 == 0
    if together and even and aligned:
        return x_BTHD.as_strided((batch * tokens, heads * dim), (row, 1))
    return x_BTHD.contiguous().view(batch * tokens, heads * dim)


def scan(
    a: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None, scale: float, *,
    initial: Tensor | None = None, final: Tensor | None = None, reverse: bool = False, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """One pass: out [B, T, H, columns of c] in a's dtype. States are FP32 [N, H, K, V]: `initial` is read, `final` written.

    `transposed` where the state's rows are c's columns: a then has V columns and c has K.
    """
    batch, tokens, heads, width_a = a.shape
    width = c.shape[-1]
    out = torch.empty((batch, tokens, heads, width), dtype=a.dtype, device=a.device)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    a, b, c = _flat(a), _flat(b), _flat(c)
    g = (log_decay * LOG2_E).float()
    hopper = _hopper()
    if hopper is not None and hopper.serves(a, width_a, width):
        how = {"tokens": tokens, "initial": initial, "final": final, "reverse": reverse, "transposed": transposed}
        hopper.launch(a, b, c, out.view(a.shape[0], -1), g, cu_seqlens, scale, grid=(heads, sequences), **how)
        return out
    scan_kernel[(triton.cdiv(width, COLUMNS), heads, sequences)](
        a, b, c, out, g if initial is None else initial, g if final is None else final, g, cu_seqlens,
        a.stride(0), b.stride(0), c.stride(0), *((1, width_a) if transposed else (width, 1)), tokens, heads, scale,
        A=width_a, WIDTH=width, A_PAD=padded(width_a), COLUMNS=COLUMNS, CHUNK=CHUNK, PACKED=cu_seqlens is not None,
        REVERSE=reverse, HAS_INITIAL=initial is not None, HAS_FINAL=final is not None,
        PRECISION="ieee" if a.dtype == torch.float32 else "tf32", num_warps=4 if width_a <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return out


@cache
def _slots(device: torch.device) -> int:
    """Programs that run at once; 0 in the interpreter, where nothing runs at once."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def _pieces(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Pieces | None:
    """How long rows of few heads are cut; None where every document is one scan, as it always is in batch-invariant mode."""
    if batch_invariant():
        return None
    batch, tokens, heads = q.shape[:3]
    programs = heads * triton.cdiv(max(q.shape[3], v.shape[3]), 64)
    documents = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    length = piece_length(tokens, batch, documents, programs, _slots(q.device))
    if length is None:
        return None
    bounds = torch.arange(batch + 1, device=q.device) * tokens if cu_seqlens is None else cu_seqlens
    return cut(bounds, batch * tokens, length)


def _states(q: Tensor, v: Tensor, documents: int) -> Tensor:
    return torch.empty((documents, q.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32, device=q.device)


def _documents(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@torch.library.custom_op("openling::lightning", mutates_args=())
def lightning_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    want_final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, T, H, V] in q's dtype and final states FP32 [N, H, K, V] (N = 0 unless wanted); arguments as the twin's."""
    final = _states(q, v, _documents(q, cu_seqlens) if want_final else 0)
    if q.shape[1] == 0:
        return torch.empty_like(v), final.zero_() if initial is None or not want_final else final.copy_(initial)
    initial = None if initial is None else initial.float().contiguous()
    pieces = _pieces(q, v, cu_seqlens)
    if pieces is None:
        return scan(q, k, v, log_decay, cu_seqlens, scale, initial=initial, final=final if want_final else None), final
    g = (log_decay * LOG2_E).float()
    incoming = incoming_states(_flat(k), _flat(v), g, pieces, q.shape[2], 1.0, initial, reverse=False)
    ends = torch.empty_like(incoming) if want_final else None
    out = scan(q, k, v, log_decay, pieces.bounds, scale, initial=incoming, final=ends)
    return out, final if ends is None else ends[pieces.last]


def row_states(b: Tensor, c: Tensor, log_decay: Tensor, *, reverse: bool) -> Tensor:
    """What the tokens of each row leave behind them FP32 [B, H, K, V]; in reverse the gradient they have for the state before.

    b [B, T, H, K] and c [B, T, H, V], T > 0. The twins are `context_parallel.state_after` and `state_before`.
    """
    batch, tokens, heads = b.shape[:3]
    count = min(ROW_PIECES, triton.cdiv(tokens, ROW_PIECE))
    pieces = whole_rows(batch, tokens, count, b.device, reverse=reverse)
    g = (log_decay * LOG2_E).float()
    states = incoming_states(_flat(b), _flat(c), g, pieces, heads, 1.0, None, reverse=reverse)
    return states.unflatten(0, (batch, count + 1))[:, 0 if reverse else count]


@torch.library.custom_op("openling::lightning_backward", mutates_args=())
def lightning_backward(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v in their dtype and, where there was an initial state, of it FP32 [N, H, K, V] (else N = 0)."""
    dinitial = _states(q, v, 0 if initial is None else _documents(q, cu_seqlens))
    if q.shape[1] == 0:
        nothing = dinitial.zero_() if dfinal is None or initial is None else dinitial.copy_(dfinal)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), nothing
    before, behind = (None if x is None else x.float().contiguous() for x in (initial, dfinal))
    pieces = _pieces(q, v, cu_seqlens)
    starts = None if initial is None else dinitial
    if pieces is not None:
        g, heads = (log_decay * LOG2_E).float(), q.shape[2]
        before = incoming_states(_flat(k), _flat(v), g, pieces, heads, 1.0, before, reverse=False)
        behind = incoming_states(_flat(q), _flat(dout), g, pieces, heads, scale, behind, reverse=True)
        starts = None if initial is None else torch.empty_like(before)
    how = (log_decay, cu_seqlens if pieces is None else pieces.bounds, scale)
    dq = scan(dout, v, k, *how, initial=before, transposed=True)
    dk = scan(v, dout, q, *how, initial=behind, reverse=True, transposed=True)
    dv = scan(k, q, dout, *how, initial=behind, final=starts, reverse=True)
    return dq, dk, dv, dinitial if pieces is None or starts is None else starts[pieces.first]


@lightning_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    want_final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty((*q.shape[:3], v.shape[3])), _states(q, v, _documents(q, cu_seqlens) if want_final else 0)


@lightning_backward.register_fake
def _(
    dout: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dinitial = _states(q, v, 0 if initial is None else _documents(q, cu_seqlens))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dinitial


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, log_decay, initial, cu_seqlens, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial, cu_seqlens = ctx.saved_tensors
    dout = torch.zeros_like(v) if dout is None else dout
    dfinal = None if dfinal is None or dfinal.shape[0] == 0 else dfinal
    dq, dk, dv, dinitial = lightning_backward(dout, dfinal, q, k, v, log_decay, initial, cu_seqlens, ctx.scale)
    return dq, dk, dv, None, None if initial is None else dinitial, None, None, None


lightning_forward.register_autograd(_backward, setup_context=_setup)
