"""Split of a joint projection, QK-norm and half-split rotation in one pass, forward and backward.

Twin: `ops.fused.split_norm_rope`. Per head, with u the projection's row, x = silu(u) or u, r = (mean(x^2) + eps)^-1/2 and R the
rotation of the token:

    z = R (w x r)        g = w R^T dz        dx = r g - x r^3 mean(g x)        dw = sum of (R^T dz) x r

FP32 inside, one rounding at the end, where the twin rounds the normed value, its product with the weight and the rotated one.
Backward reads the projection again, saves nothing else and writes one gradient for it, dv included. Bytes per head dim in half
precision: 4 forward for q and k; 6 backward, and 4 for v.

A head's row is held as four pieces: the two halves that turn into each other (r/2 dims each) and the two halves of the dims
that pass. With half of the dims rotated, as in Ling, all four have the same shape and thus the same place in the threads: sums
over a row need neither shared memory nor a barrier.
Legend: B batch, T tokens, N = B T, H heads, K key/value heads, D head dim, C = (H + 2K) D, r rotated dims, P programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openling.ops.kernels.partial import PROCESSORS, sum_partials, unit_stride


class Heads(NamedTuple):
    """Tile of a launch: heads of a program and its warps. Backward: programs per processor, load stages in flight."""

    block: int
    warps: int
    programs: int = 1
    stages: int = 1


def heads_config(kv_heads: int, dim: int, *, backward: bool) -> Heads:
    """Forward 32 values per thread. Backward 16, which take up to 128 registers.

    Backward programs stay for the whole launch, so no more may start than a processor holds at once: 16 warps. Their loops have
    no barrier, so warps drift apart and keep the memory busy without staging loads in shared memory.
    """
    padded = triton.next_power_of_2(dim)
    if not backward:
        block = max(4, min(32, triton.next_power_of_2(kv_heads)))
        return Heads(block, min(8, max(1, block * padded // 1024)))
    block = max(4, min(16, triton.next_power_of_2(kv_heads)))
    warps = min(8, max(1, block * padded // 512))
    return Heads(block, warps, max(1, 16 // warps))


def heads_candidates(kv_heads: int, dim: int, *, backward: bool) -> list[Heads]:
    """Tiles worth measuring."""
    padded, most = triton.next_power_of_2(dim), max(4, triton.next_power_of_2(kv_heads))
    tiles = [
        (block, max(1, block * padded // (32 * values)))
        for block in (4, 8, 16, 32, 64)
        for values in (8, 16, 32)
        if block <= most and block * padded // (32 * values) <= 16
    ]
    if not backward:
        return [Heads(*tile) for tile in tiles]
    return [
        Heads(block, warps, programs, stages)
        for block, warps in tiles
        for programs in (1, 2, 3, 4, 5, 6, 8, 12, 16)
        for stages in (1, 2, 3)
        if 8 <= programs * warps <= 32
    ]


@triton.jit
def _live(head, heads, column, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Mask of a piece [heads, dims]; its columns come in only where they must, so that wide loads stay whole."""
    live = head < heads
    return live if SIZE == PADDED else live & (column < SIZE)


@triton.jit
def _read(pointers, mask, SILU: tl.constexpr):
    """silu(u) and its slope, or u and 1."""
    u = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    slope = 1.0
    if SILU:
        s = tl.sigmoid(u)
        u = u * s
        slope = s + u * (1.0 - s)
    return u, slope


@triton.jit
def _place(index, tokens):
    """A token's index over all sequences, its sequence and its place there, for 64-bit offsets; divided in 32 bits."""
    return tl.cast(index, tl.int64), tl.cast(index // tokens, tl.int64), tl.cast(index % tokens, tl.int64)


@triton.jit
def _weight(weight, column, SIZE: tl.constexpr):
    return tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _turn_heads(
    x, out, weight, cos, sin, heads, eps,
    DIM: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, REST: tl.constexpr, REST_P: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """z for up to BLOCK heads that lie one after another at x and out; the table pointers are those of the token."""
    head, j, e = tl.arange(0, BLOCK)[:, None], tl.arange(0, HALF_P)[None, :], tl.arange(0, REST_P)[None, :]
    turned, kept = _live(head, heads, j, HALF, HALF_P), _live(head, heads, e, REST, REST_P)
    at_a, at_c = head * DIM + j, head * DIM + 2 * HALF + e
    r = tl.zeros((BLOCK,), tl.float32)
    if HALF > 0:
        a, _ = _read(x + at_a, turned, SILU)
        b, _ = _read(x + at_a + HALF, turned, SILU)
        r += tl.sum(a * a + b * b, 1)
    if REST > 0:
        c, _ = _read(x + at_c, kept, SILU)
        d, _ = _read(x + at_c + REST, kept, SILU)
        r += tl.sum(c * c + d * d, 1)
    r = tl.rsqrt(r / DIM + eps)[:, None]
    if HALF > 0:
        if NORM:
            a, b = a * r * _weight(weight, j, HALF), b * r * _weight(weight + HALF, j, HALF)
        cos_j, sin_j = _weight(cos, j, HALF), _weight(sin, j, HALF)
        tl.store(out + at_a, (a * cos_j - b * sin_j).to(out.dtype.element_ty), mask=turned)
        tl.store(out + at_a + HALF, (b * cos_j + a * sin_j).to(out.dtype.element_ty), mask=turned)
    if REST > 0:
        if NORM:
            c = c * r * _weight(weight + 2 * HALF, e, REST)
            d = d * r * _weight(weight + 2 * HALF + REST, e, REST)
        tl.store(out + at_c, c.to(out.dtype.element_ty), mask=kept)
        tl.store(out + at_c + REST, d.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _split_norm_rope_forward(
    qkv, q, k, v, q_weight, k_weight, cos, sin, tokens, qkv_batch, qkv_token, table_batch, table_token, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HALF_P: tl.constexpr, REST: tl.constexpr, REST_P: tl.constexpr, DIM_P: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One block of heads of one token, of q or of k or, with SILU, of v; neighbouring programs share the token's rows."""
    block, batch = tl.program_id(0) % BLOCKS, tl.program_id(1).to(tl.int64)
    place = (tl.program_id(0) // BLOCKS).to(tl.int64)
    token = batch * tokens + place
    row = qkv + batch * qkv_batch + place * qkv_token
    table = batch * table_batch + place * table_token
    q_blocks: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    kv_blocks: tl.constexpr = (KV_HEADS + BLOCK - 1) // BLOCK
    if block < q_blocks:
        first = block * BLOCK
        _turn_heads(
            row + first * DIM, q + token * (HEADS * DIM) + first * DIM, q_weight, cos + table, sin + table,
            HEADS - first, eps, DIM, HALF, HALF_P, REST, REST_P, BLOCK, NORM, SILU,
        )  # fmt: skip
    elif block < q_blocks + kv_blocks:
        first = (block - q_blocks) * BLOCK
        _turn_heads(
            row + (HEADS + first) * DIM, k + token * (KV_HEADS * DIM) + first * DIM, k_weight, cos + table, sin + table,
            KV_HEADS - first, eps, DIM, HALF, HALF_P, REST, REST_P, BLOCK, NORM, SILU,
        )  # fmt: skip
    else:
        first = (block - q_blocks - kv_blocks) * BLOCK
        head, dim = tl.arange(0, BLOCK)[:, None], tl.arange(0, DIM_P)[None, :]
        live = _live(head, KV_HEADS - first, dim, DIM, DIM_P)
        at = head * DIM + dim
        x, _ = _read(row + (HEADS + KV_HEADS + first) * DIM + at, live, SILU)
        tl.store(v + token * (KV_HEADS * DIM) + first * DIM + at, x.to(v.dtype.element_ty), mask=live)


@triton.jit
def _pull_heads(
    qkv, dz, dqkv, weight, cos, sin, partial, program, programs, count, tokens, heads, first,
    qkv_batch, qkv_token, dz_batch, dz_token, dz_head, table_batch, table_token, eps,
    ROW: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, REST: tl.constexpr, REST_P: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """du of up to BLOCK heads of the tokens of one program, and its share of dw. `first`: the heads' place in a row of qkv."""
    head, j, e = tl.arange(0, BLOCK)[:, None], tl.arange(0, HALF_P)[None, :], tl.arange(0, REST_P)[None, :]
    turned, kept = _live(head, heads, j, HALF, HALF_P), _live(head, heads, e, REST, REST_P)
    at_a, at_c = (first + head) * DIM + j, (first + head) * DIM + 2 * HALF + e
    from_a, from_c = head * dz_head + j, head * dz_head + 2 * HALF + e
    dw_a, dw_b = tl.zeros((BLOCK, HALF_P), tl.float32), tl.zeros((BLOCK, HALF_P), tl.float32)
    dw_c, dw_d = tl.zeros((BLOCK, REST_P), tl.float32), tl.zeros((BLOCK, REST_P), tl.float32)
    if NORM:
        w_a, w_b = _weight(weight, j, HALF), _weight(weight + HALF, j, HALF)
        w_c, w_d = _weight(weight + 2 * HALF, e, REST), _weight(weight + 2 * HALF + REST, e, REST)
    for index in tl.range(program, count, programs, num_stages=STAGES):
        token, batch, place = _place(index, tokens)
        x = qkv + batch * qkv_batch + place * qkv_token
        dz_row = dz + batch * dz_batch + place * dz_token
        dx = dqkv + token * ROW
        table = batch * table_batch + place * table_token
        square, dot = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        if HALF > 0:
            a, slope_a = _read(x + at_a, turned, SILU)
            b, slope_b = _read(x + at_a + HALF, turned, SILU)
            da = tl.load(dz_row + from_a, mask=turned, other=0.0).to(tl.float32)
            db = tl.load(dz_row + from_a + HALF, mask=turned, other=0.0).to(tl.float32)
            cos_j, sin_j = _weight(cos + table, j, HALF), _weight(sin + table, j, HALF)
            da, db = da * cos_j + db * sin_j, db * cos_j - da * sin_j
        if REST > 0:
            c, slope_c = _read(x + at_c, kept, SILU)
            d, slope_d = _read(x + at_c + REST, kept, SILU)
            dc = tl.load(dz_row + from_c, mask=kept, other=0.0).to(tl.float32)
            dd = tl.load(dz_row + from_c + REST, mask=kept, other=0.0).to(tl.float32)
        if NORM:
            if HALF > 0:
                square += tl.sum(a * a + b * b, 1)
                dot += tl.sum(da * w_a * a + db * w_b * b, 1)
            if REST > 0:
                square += tl.sum(c * c + d * d, 1)
                dot += tl.sum(dc * w_c * c + dd * w_d * d, 1)
            r = tl.rsqrt(square / DIM + eps)
            back = (r * r * r * dot / DIM)[:, None]
            r = r[:, None]
            if HALF > 0:
                dw_a += da * a * r
                dw_b += db * b * r
                da, db = da * w_a * r - a * back, db * w_b * r - b * back
            if REST > 0:
                dw_c += dc * c * r
                dw_d += dd * d * r
                dc, dd = dc * w_c * r - c * back, dd * w_d * r - d * back
        if HALF > 0:
            tl.store(dx + at_a, (da * slope_a).to(dqkv.dtype.element_ty), mask=turned)
            tl.store(dx + at_a + HALF, (db * slope_b).to(dqkv.dtype.element_ty), mask=turned)
        if REST > 0:
            tl.store(dx + at_c, (dc * slope_c).to(dqkv.dtype.element_ty), mask=kept)
            tl.store(dx + at_c + REST, (dd * slope_d).to(dqkv.dtype.element_ty), mask=kept)
    if NORM:
        j, e = tl.arange(0, HALF_P), tl.arange(0, REST_P)
        if HALF > 0:
            tl.store(partial + j, tl.sum(dw_a, 0), mask=j < HALF)
            tl.store(partial + HALF + j, tl.sum(dw_b, 0), mask=j < HALF)
        if REST > 0:
            tl.store(partial + 2 * HALF + e, tl.sum(dw_c, 0), mask=e < REST)
            tl.store(partial + 2 * HALF + REST + e, tl.sum(dw_d, 0), mask=e < REST)


@triton.jit
def _split_norm_rope_backward(
    qkv, dq, dk, dv, dqkv, q_weight, k_weight, cos, sin, partial, count, tokens,
    qkv_batch, qkv_token, dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
    table_batch, table_token, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HALF_P: tl.constexpr, REST: tl.constexpr, REST_P: tl.constexpr, DIM_P: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program p of block b takes that block of heads of tokens p, p + P, ...; rows of `partial`: q's blocks, then k's."""
    block, program = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    programs = tl.num_programs(0) // BLOCKS
    row: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    q_blocks: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    kv_blocks: tl.constexpr = (KV_HEADS + BLOCK - 1) // BLOCK
    share = partial + (block * programs + program) * DIM
    if block < q_blocks:
        first = block * BLOCK
        _pull_heads(
            qkv, dq + first * dq_head, dqkv, q_weight, cos, sin, share, program, programs, count, tokens, HEADS - first, first,
            qkv_batch, qkv_token, dq_batch, dq_token, dq_head, table_batch, table_token, eps,
            row, DIM, HALF, HALF_P, REST, REST_P, BLOCK, NORM, SILU, STAGES,
        )  # fmt: skip
    elif block < q_blocks + kv_blocks:
        first = (block - q_blocks) * BLOCK
        _pull_heads(
            qkv, dk + first * dk_head, dqkv, k_weight, cos, sin, share, program, programs, count, tokens,
            KV_HEADS - first, HEADS + first,
            qkv_batch, qkv_token, dk_batch, dk_token, dk_head, table_batch, table_token, eps,
            row, DIM, HALF, HALF_P, REST, REST_P, BLOCK, NORM, SILU, STAGES,
        )  # fmt: skip
    else:
        first = (block - q_blocks - kv_blocks) * BLOCK
        head, dim = tl.arange(0, BLOCK)[:, None], tl.arange(0, DIM_P)[None, :]
        live = _live(head, KV_HEADS - first, dim, DIM, DIM_P)
        at = (HEADS + KV_HEADS + first + head) * DIM + dim
        for index in tl.range(program, count, programs, num_stages=STAGES):
            token, batch, place = _place(index, tokens)
            given = dv + batch * dv_batch + place * dv_token + (first + head) * dv_head + dim
            dx = tl.load(given, mask=live, other=0.0)
            if SILU:
                _, slope = _read(qkv + batch * qkv_batch + place * qkv_token + at, live, SILU)
                dx = dx.to(tl.float32) * slope
            tl.store(dqkv + token * row + at, dx.to(dqkv.dtype.element_ty), mask=live)


def _shape(qkv_BTC: Tensor, cos: Tensor, heads: int, kv_heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Compile-time sizes of both kernels (heads, dims, pieces and their padding), and the tables' strides."""
    dim, half = qkv_BTC.shape[-1] // (heads + 2 * kv_heads), cos.shape[-1]
    assert dim % 2 == 0, f"head dim {dim} is odd"
    rest = dim // 2 - half
    pads = [max(1, triton.next_power_of_2(x)) for x in (half, rest, dim)]
    strides = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
    return (heads, kv_heads, dim, half, pads[0], rest, pads[1], pads[2]), strides


@torch.library.custom_op("openling::split_norm_rope", mutates_args=())
def _split_norm_rope(
    qkv_BTC: Tensor, q_weight_D: Tensor | None, k_weight_D: Tensor | None, cos: Tensor, sin: Tensor,
    heads: int, kv_heads: int, eps: float, silu: bool,
) -> list[Tensor]:  # fmt: skip
    """q and k and, with silu, v."""
    qkv_BTC, cos, sin = unit_stride(qkv_BTC), cos.contiguous(), sin.contiguous()
    (batch, tokens, _), sizes = qkv_BTC.shape, _shape(qkv_BTC, cos, heads, kv_heads)
    dim = sizes[0][2]
    out = [qkv_BTC.new_empty(batch, tokens, h, dim) for h in (heads, kv_heads, kv_heads)[: 3 if silu else 2]]
    config = heads_config(kv_heads, dim, backward=False)
    blocks = triton.cdiv(heads, config.block) + (2 if silu else 1) * triton.cdiv(kv_heads, config.block)
    _split_norm_rope_forward[(tokens * blocks, batch)](
        qkv_BTC, out[0], out[1], out[-1], q_weight_D, k_weight_D, cos, sin, tokens, *qkv_BTC.stride()[:2], *sizes[1], eps,
        *sizes[0], config.block, blocks, q_weight_D is not None, silu, num_warps=config.warps,
    )  # fmt: skip
    return out


@torch.library.custom_op("openling::split_norm_rope_backward", mutates_args=())
def _gradients(
    qkv_BTC: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    q_weight_D: Tensor | None, k_weight_D: Tensor | None, cos: Tensor, sin: Tensor,
    heads: int, kv_heads: int, eps: float, silu: bool,
) -> list[Tensor]:  # fmt: skip
    """dqkv and, with norms, the gradients of q's and k's weight [2, D]."""
    qkv_BTC, dq, dk, dv, cos, sin = (*map(unit_stride, (qkv_BTC, dq, dk, dv)), cos.contiguous(), sin.contiguous())
    (batch, tokens, _), sizes = qkv_BTC.shape, _shape(qkv_BTC, cos, heads, kv_heads)
    dim, dqkv = sizes[0][2], torch.empty(qkv_BTC.shape, dtype=qkv_BTC.dtype, device=qkv_BTC.device)
    config = heads_config(kv_heads, dim, backward=True)
    q_blocks, kv_blocks = triton.cdiv(heads, config.block), triton.cdiv(kv_heads, config.block)
    blocks = q_blocks + 2 * kv_blocks
    programs = max(1, min(PROCESSORS * config.programs // blocks, batch * tokens))
    partial = torch.empty((q_blocks + kv_blocks) * programs, dim, dtype=torch.float32, device=qkv_BTC.device)
    _split_norm_rope_backward[(programs * blocks,)](
        qkv_BTC, dq, dk, dv, dqkv, q_weight_D, k_weight_D, cos, sin, partial, batch * tokens, tokens,
        *qkv_BTC.stride()[:2], *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *sizes[1], eps,
        *sizes[0], config.block, blocks, q_weight_D is not None, silu, config.stages, num_warps=config.warps,
    )  # fmt: skip
    if q_weight_D is None:
        return [dqkv]
    return [dqkv, sum_partials(partial, q_weight_D.dtype, q_blocks * programs)]


@_split_norm_rope.register_fake
def _(
    qkv_BTC: Tensor, q_weight_D: Tensor | None, k_weight_D: Tensor | None, cos: Tensor, sin: Tensor,
    heads: int, kv_heads: int, eps: float, silu: bool,
) -> list[Tensor]:  # fmt: skip
    (batch, tokens, channels), rows = qkv_BTC.shape, heads + 2 * kv_heads
    return [qkv_BTC.new_empty(batch, tokens, h, channels // rows) for h in (heads, kv_heads, kv_heads)[: 3 if silu else 2]]


@_gradients.register_fake
def _(
    qkv_BTC: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    q_weight_D: Tensor | None, k_weight_D: Tensor | None, cos: Tensor, sin: Tensor,
    heads: int, kv_heads: int, eps: float, silu: bool,
) -> list[Tensor]:  # fmt: skip
    dqkv = qkv_BTC.new_empty(qkv_BTC.shape)
    return [dqkv] if q_weight_D is None else [dqkv, q_weight_D.new_empty(2, q_weight_D.shape[0])]


class _SplitNormRope(torch.autograd.Function):
    """v leaves as a view of the projection where no silu changes it: its gradient still joins q's and k's in one tensor."""

    @staticmethod
    def forward(
        ctx: Any, qkv_BTC: Tensor, q_weight_D: Tensor | None, k_weight_D: Tensor | None, cos: Tensor, sin: Tensor,
        heads: int, kv_heads: int, eps: float, silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(qkv_BTC, q_weight_D, k_weight_D, cos, sin)
        ctx.call = (heads, kv_heads, eps, silu)
        q, k, *v = _split_norm_rope(qkv_BTC, q_weight_D, k_weight_D, cos, sin, heads, kv_heads, eps, silu)
        return q, k, v[0] if silu else qkv_BTC.unflatten(-1, (heads + 2 * kv_heads, -1))[:, :, heads + kv_heads :]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        qkv, *rest = ctx.saved_tensors
        dqkv, *dw = _gradients(qkv, dq, dk, dv, *rest, *ctx.call)
        dq_weight, dk_weight = dw[0].unbind() if dw else (None, None)
        return dqkv, dq_weight, dk_weight, *(None,) * 6


def split_norm_rope(
    qkv_BTC: Tensor, norms: tuple[Tensor, Tensor] | None, tables: tuple[Tensor, Tensor],
    heads: int, kv_heads: int, eps: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [B, T, H, D] and k [B, T, K, D] in qkv's dtype; v, a view of qkv or, with silu, a tensor of its own. Any row strides."""
    return _SplitNormRope.apply(qkv_BTC, *(norms or (None, None)), *tables, heads, kv_heads, eps, silu)
