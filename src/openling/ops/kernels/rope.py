"""Rotation in both pairings, and MLA's queries, keys and values in expanded form.

Twins: `ops.rope.apply_rope`, `ops.fused.latent_qkv`. Rotations are computed in FP32 and rounded once, as in the twins; the rest
is copied. The backward pass of a rotation is the rotation the other way. Bytes per dim in half precision: 4 for q; k and v read
n and write n + r dims per head forward, and read n + r + Dv and write n + Dv backward; what heads share is next to nothing.
Legend: B batch, T tokens, S cached and new tokens, H heads, D head dim, E = n + r dims of an MLA head of which the last r turn,
Dv value dims, C = n + Dv.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from openling.ops.kernels.partial import unit_stride

# Values of a program's tile, 32 per thread: pure copies need many loads in flight and few programs.
TILE = 4096


@triton.jit
def _rows(tokens, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """ROWS heads of sequence program_id(1): mask, sequence, token's place, head, and place among all heads of all sequences."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    batch = tl.program_id(1).to(tl.int64)
    return row < tokens * HEADS, batch, (row // HEADS).to(tl.int64), row % HEADS, batch * tokens * HEADS + row


@triton.jit
def _rope_turn(
    x, out, cos, sin, tokens, x_batch, x_token, x_head, table_batch, table_token,
    HEADS: tl.constexpr, DIM: tl.constexpr, START: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, KEPT_P: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turns dims START ... START + 2 HALF of ROWS heads and copies the rest, which lies before them or behind."""
    live, batch, place, head, target = _rows(tokens, HEADS, ROWS)
    source = x + batch * x_batch + place * x_token + head * x_head
    target = out + target * DIM
    kept: tl.constexpr = DIM - 2 * HALF
    if kept > 0:
        e = tl.arange(0, KEPT_P)[None, :] + (0 if START > 0 else 2 * HALF)
        there = live & (tl.arange(0, KEPT_P) < kept)[None, :] if kept != KEPT_P else live
        tl.store(target + e, tl.load(source + e, mask=there, other=0.0), mask=there)
    if HALF > 0:
        j = tl.arange(0, HALF_P)[None, :]
        there = live & (j < HALF) if HALF != HALF_P else live
        table = batch * table_batch + place * table_token + j
        cos_j = tl.load(cos + table, mask=there, other=0.0)
        sin_j = tl.load(sin + table, mask=there, other=0.0)
        sin_j = -sin_j if INVERSE else sin_j
        if INTERLEAVED:
            both = START + tl.arange(0, 2 * HALF_P)[None, :]
            these = live & (both < START + 2 * HALF) if HALF != HALF_P else live
            pairs = tl.reshape(tl.load(source + both, mask=these, other=0.0), (ROWS, HALF_P, 2)).to(tl.float32)
            a, b = tl.split(pairs)
            turned = tl.reshape(tl.join(a * cos_j - b * sin_j, b * cos_j + a * sin_j), (ROWS, 2 * HALF_P))
            tl.store(target + both, turned.to(out.dtype.element_ty), mask=these)
        else:
            a = tl.load(source + START + j, mask=there, other=0.0).to(tl.float32)
            b = tl.load(source + START + HALF + j, mask=there, other=0.0).to(tl.float32)
            tl.store(target + START + j, (a * cos_j - b * sin_j).to(out.dtype.element_ty), mask=there)
            tl.store(target + START + HALF + j, (b * cos_j + a * sin_j).to(out.dtype.element_ty), mask=there)


@torch.library.custom_op("openling::rope", mutates_args=())
def rope(x_BTHD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, start: int, inverse: bool) -> Tensor:
    """x with dims start ... start + r of every head turned by tables [1 or B, T, 1, r/2]: forth, or back for `inverse`.

    start is 0 or D - r. Any strides but the last; the result is contiguous.
    """
    x_BTHD, cos, sin = unit_stride(x_BTHD), cos.contiguous(), sin.contiguous()
    (batch, tokens, heads, dim), half = x_BTHD.shape, cos.shape[-1]
    assert start in (0, dim - 2 * half), f"rotated dims must be the first or the last, got start {start}"
    out = x_BTHD.new_empty(x_BTHD.shape)
    rows = max(1, TILE // triton.next_power_of_2(dim))
    _rope_turn[(triton.cdiv(tokens * heads, rows), batch)](
        x_BTHD, out, cos, sin, tokens, *x_BTHD.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        heads, dim, start, half, max(1, triton.next_power_of_2(half)), max(1, triton.next_power_of_2(dim - 2 * half)),
        interleaved, inverse, rows, num_warps=4,
    )  # fmt: skip
    return out


@rope.register_fake
def _(x_BTHD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, start: int, inverse: bool) -> Tensor:
    return x_BTHD.new_empty(x_BTHD.shape)


def _keep_rope(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, *ctx.call = inputs
    ctx.save_for_backward(cos, sin)


def _rope_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    interleaved, start, inverse = ctx.call
    return rope(dout, *ctx.saved_tensors, interleaved, start, not inverse), *(None,) * 5


rope.register_autograd(_rope_gradient, setup_context=_keep_rope)


def apply_rope(x_BTHD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first r dims of every head turned."""
    return rope(x_BTHD, cos, sin, interleaved, 0, False)


# ---------------------------------------------------------------------------------------------------------------------
# MLA's keys and values
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _rope_join_keys(
    kv, shared, k, tokens, kv_batch, kv_token, kv_head, shared_batch, shared_token,
    HEADS: tl.constexpr, NOPE: tl.constexpr, NOPE_P: tl.constexpr, ROPE: tl.constexpr, ROPE_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keys of ROWS heads: their own n dims, then the row that all heads of a token share."""
    there, batch, place, head, target = _rows(tokens, HEADS, ROWS)
    target = k + target * (NOPE + ROPE)
    n, r = tl.arange(0, NOPE_P)[None, :], tl.arange(0, ROPE_P)[None, :]
    live = there & (n < NOPE) if NOPE != NOPE_P else there
    own = tl.load(kv + batch * kv_batch + place * kv_token + head * kv_head + n, mask=live, other=0.0)
    tl.store(target + n, own, mask=live)
    live = there & (r < ROPE) if ROPE != ROPE_P else there
    turned = tl.load(shared + batch * shared_batch + place * shared_token + r, mask=live, other=0.0)
    tl.store(target + NOPE + r, turned.to(k.dtype.element_ty), mask=live)


@triton.jit
def _rope_part_gradients(
    dk, dv, dkv, dshared, tokens, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
    HEADS: tl.constexpr, NOPE: tl.constexpr, NOPE_P: tl.constexpr, ROPE: tl.constexpr, ROPE_P: tl.constexpr,
    VALUE: tl.constexpr, VALUE_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: dkv of every head from dk and dv, and the shared row's gradient, summed over heads in a fixed order."""
    batch, place = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    token = batch * tokens + place
    dk += batch * dk_batch + place * dk_token
    dv += batch * dv_batch + place * dv_token
    dkv += token * (HEADS * (NOPE + VALUE))
    n, r, c = tl.arange(0, NOPE_P)[None, :], tl.arange(0, ROPE_P)[None, :], tl.arange(0, VALUE_P)[None, :]
    total = tl.zeros((BLOCK, ROPE_P), tl.float32)
    for first in range(0, HEADS, BLOCK):
        head = first + tl.arange(0, BLOCK)[:, None]
        live = (head < HEADS) & (n < NOPE)
        own = tl.load(dk + head * dk_head + n, mask=live, other=0.0)
        tl.store(dkv + head * (NOPE + VALUE) + n, own.to(dkv.dtype.element_ty), mask=live)
        total += tl.load(dk + head * dk_head + NOPE + r, mask=(head < HEADS) & (r < ROPE), other=0.0).to(tl.float32)
        live = (head < HEADS) & (c < VALUE)
        value = tl.load(dv + head * dv_head + c, mask=live, other=0.0)
        tl.store(dkv + head * (NOPE + VALUE) + NOPE + c, value.to(dkv.dtype.element_ty), mask=live)
    r = tl.arange(0, ROPE_P)
    tl.store(dshared + token * ROPE + r, tl.sum(total, 0).to(dshared.dtype.element_ty), mask=r < ROPE)


@torch.library.custom_op("openling::latent_keys", mutates_args=())
def _latent_keys(kv_BSHC: Tensor, shared_BSr: Tensor, nope: int) -> Tensor:
    """Keys [B, S, H, n + r]."""
    kv_BSHC, shared_BSr = unit_stride(kv_BSHC), unit_stride(shared_BSr)
    (batch, tokens, heads, _), rotary = kv_BSHC.shape, shared_BSr.shape[-1]
    k = kv_BSHC.new_empty(batch, tokens, heads, nope + rotary)
    rows = max(1, TILE // triton.next_power_of_2(nope + rotary))
    _rope_join_keys[(triton.cdiv(tokens * heads, rows), batch)](
        kv_BSHC, shared_BSr, k, tokens, *kv_BSHC.stride()[:3], *shared_BSr.stride()[:2],
        heads, nope, triton.next_power_of_2(nope), rotary, triton.next_power_of_2(rotary), rows, num_warps=4,
    )  # fmt: skip
    return k


@torch.library.custom_op("openling::latent_keys_backward", mutates_args=())
def _latent_gradients(dk: Tensor, dv: Tensor, nope: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dkv [B, S, H, n + Dv] in dk's dtype and the shared row's gradient [B, S, r] in `dtype`."""
    dk, dv = unit_stride(dk), unit_stride(dv)
    (batch, tokens, heads, width), value = dk.shape, dv.shape[-1]
    dkv = dk.new_empty(batch, tokens, heads, nope + value)
    dshared = dk.new_empty(batch, tokens, width - nope, dtype=dtype)
    pads = [triton.next_power_of_2(x) for x in (nope, width - nope, value)]
    _rope_part_gradients[(tokens, batch)](
        dk, dv, dkv, dshared, tokens, *dk.stride()[:3], *dv.stride()[:3],
        heads, nope, pads[0], width - nope, pads[1], value, pads[2], min(16, triton.next_power_of_2(heads)), num_warps=4,
    )  # fmt: skip
    return dkv, dshared


@_latent_keys.register_fake
def _(kv_BSHC: Tensor, shared_BSr: Tensor, nope: int) -> Tensor:
    return kv_BSHC.new_empty(*kv_BSHC.shape[:3], nope + shared_BSr.shape[-1])


@_latent_gradients.register_fake
def _(dk: Tensor, dv: Tensor, nope: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dkv = dk.new_empty(*dk.shape[:3], nope + dv.shape[-1])
    return dkv, dk.new_empty(*dk.shape[:2], dk.shape[-1] - nope, dtype=dtype)


class _LatentKeysValues(torch.autograd.Function):
    """v leaves as a view of the up-projection: its gradient still joins that of the keys in one tensor."""

    @staticmethod
    def forward(ctx: Any, kv_BSHC: Tensor, shared_BSr: Tensor, nope: int) -> tuple[Tensor, Tensor]:
        ctx.nope, ctx.dtype = nope, shared_BSr.dtype
        return _latent_keys(kv_BSHC, shared_BSr, nope), kv_BSHC[..., nope:]

    @staticmethod
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return *_latent_gradients(dk, dv, ctx.nope, ctx.dtype), None


def latent_qkv(
    q_BTHE: Tensor, kv_BSHC: Tensor, shared_BSr: Tensor, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k [B, T or S, H, E], contiguous, and v, a view of kv. `shared_BSr` is turned already."""
    nope = q_BTHE.shape[-1] - shared_BSr.shape[-1]
    k, v = _LatentKeysValues.apply(kv_BSHC, shared_BSr, nope)
    return rope(q_BTHE, *tables, True, nope, False), k, v
