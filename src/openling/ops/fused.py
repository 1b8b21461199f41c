"""Small ops that stand between matrix products. Each is a composition of plain ones, and one kernel where kernels run.

The compositions round at every step, as PyTorch does: a norm to the activations' dtype before its weight, the product with
the weight, the rotation. The kernels compute in FP32 throughout and round once, to the activations' dtype; with FP32 weights
(autocast) a composition returns FP32 where its kernel returns the activations' dtype, which the next matrix product rounds to.

Legend: B batch, T new tokens, S cached and new tokens, H heads, K key/value heads, D head dim, C channels, M hidden size,
F feed-forward width, N tokens, r rotated dims, n MLA dims without rotation, E = n + r.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from openling.ops.norm import group_rms_norm, rms_norm, stream_kernels
from openling.ops.pick import kernels_for
from openling.ops.rope import apply_rope
from openling.ops.rows import sigmoid_rows, silu_rows


def split_norm_rope(
    qkv_BTC: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    tables: tuple[Tensor, Tensor],
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, D], keys and values [B, T, K, D] from rows [Q | K | V], C = (H + 2K) D, head-major.

    silu on all three where asked; QK-norm where there are `norms`, the weights [D] of q and k; half-split rotation of the
    first dims of q and k by `tables`, cos and sin [1 or B, T, 1, r/2]. Without silu v is a view of qkv.
    """
    fast = kernels_for(qkv_BTC)
    if fast is not None:
        return fast.split_norm_rope(qkv_BTC, norms, tables, heads, kv_heads, eps, silu)
    rows = (silu_rows(qkv_BTC) if silu else qkv_BTC).unflatten(-1, (heads + 2 * kv_heads, -1))
    both, v = rows.split((heads + kv_heads, kv_heads), dim=2)
    if norms is not None:
        both = rms_norm(both, torch.cat([w.expand(n, -1) for w, n in zip(norms, (heads, kv_heads), strict=True)]), eps)
    q, k = apply_rope(both, *tables).split((heads, kv_heads), dim=2)
    return q, k, v


def gated_group_norm(x: Tensor, gate: Tensor, weight_C: Tensor, eps: float, groups: int) -> Tensor:
    """`group_rms_norm(x)` times sigmoid(gate): the output of a Lightning layer before its last projection; [..., C] each."""
    fast = kernels_for(x)
    if fast is not None:
        return fast.gated_group_norm(x, gate, weight_C, eps, groups)
    return group_rms_norm(x, weight_C, eps, groups) * sigmoid_rows(gate)


def decode_kernels(x: Tensor, heads: int, dim: int, groups: int) -> ModuleType | None:
    """The kernels where they decode Lightning tokens: groups of whole heads, a head dim that is a power of two."""
    return kernels_for(x) if heads % groups == 0 and dim in (16, 32, 64, 128, 256) else None


def lightning_step(
    fast: ModuleType,
    qkv_BC: Tensor,
    gate_BX: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    tables: tuple[Tensor, Tensor],
    log_decay_H: Tensor,
    weight_X: Tensor,
    memory: tuple[Tensor, Tensor, Tensor],
    *,
    eps: float,
    groups: int,
    silu: bool,
) -> Tensor:
    """One new token of every sequence by `decode_kernels`: `split_norm_rope`, the recurrence and `gated_group_norm` in one.

    memory: FP32 states [B, H, D, D], updated in place, int32 zeros [B, H] for the kernel to count in, and B row numbers.
    X = H * D, C = 3X; the rest as in those three. There is no gradient. Returns [B, X].
    """
    cos, sin = (table[:, 0, 0].expand(gate_BX.shape[0], -1) for table in tables)
    states, counters, rows = memory
    return fast.lightning_decode_step(
        qkv_BC, gate_BX, states, counters, rows, cos, sin, log_decay_H, *(norms or (None, None)), weight_X,
        eps=eps, groups=groups, silu=silu,
    )  # fmt: skip


def add_rms_norm(h: Tensor, delta: Tensor, weight_M: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h + delta, and its `rms_norm`: the residual add of one half of a block with the norm of the next; [..., M] each."""
    fast, dtype = stream_kernels(h)
    if fast is not None:
        return fast.add_rms_norm(h, delta, weight_M, eps, dtype)
    h = h + delta
    return h, rms_norm(h, weight_M, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., F] each."""
    fast = kernels_for(gate)
    if fast is not None:
        return fast.swiglu(gate, up)
    return silu_rows(gate) * up


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for rows [gate | up] [..., 2F] of one joint projection; [..., F]. Its gradient is one tensor too."""
    fast = kernels_for(gate_up)
    if fast is not None:
        return fast.swiglu_packed(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return silu_rows(gate) * up


def latent_qkv(
    q_BTHE: Tensor, kv_BSHC: Tensor, k_rope_BSr: Tensor, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, E], keys [B, S, H, E] and values [B, S, H, Dv] of MLA in expanded form.

    The last r dims of q are rotated (interleaved pairs). A key joins its head's n dims, the first of kv's C = n + Dv, with
    the one rotated row that all heads share: k_rope, rotated already, because that is what a cache keeps. v is a view of kv.
    """
    rotary = k_rope_BSr.shape[-1]
    nope = q_BTHE.shape[-1] - rotary
    fast = kernels_for(q_BTHE)
    if fast is not None:
        return fast.latent_qkv(q_BTHE, kv_BSHC, k_rope_BSr, tables)
    q_nope, q_rope = q_BTHE.split((nope, rotary), dim=-1)
    k_nope, v = kv_BSHC.split((nope, kv_BSHC.shape[-1] - nope), dim=-1)
    shared = k_rope_BSr.unsqueeze(2).expand(-1, -1, kv_BSHC.shape[2], -1)
    k = torch.cat((k_nope, shared.to(k_nope.dtype)), dim=-1)
    return torch.cat((q_nope, apply_rope(q_rope, *tables, interleaved=True)), dim=-1), k, v
