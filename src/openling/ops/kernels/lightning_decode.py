"""Lightning's decode step on NVIDIA GPUs in one launch; twin: `openling.ops.lightning_decode.decode_step_plain`.

The state is the traffic: 64 KB in and 64 KB out per head at D = 128 in FP32, against 1.5 KB of everything else. Each program
owns COLUMNS columns of one head's state. It asks for its whole tile first, prepares q and k (norm, RoPE) while the tile is on
its way, and writes the tile back once. Every column block prepares q and k again: that is 512 bytes from L2 each time.

The output norm spans the heads of a group, hence many programs. Its sum of squares must not depend on who comes when, so each
program leaves its raw outputs in `partial` and counts itself in; the one that finds itself last reads the whole group back
in fixed order, normalises, gates, and sets the counter back to 0 for the next launch (a CUDA graph needs no memset). Memory
order: all threads' stores to `partial` come before the CTA barrier; one thread then adds to the counter with acquire and
release semantics at GPU scope, so its release covers what the barrier ordered before it; the last program's add reads the
value of a chain of such adds, so its acquire covers every earlier program's stores; the reduction that spreads the ticket is
a CTA barrier, after which all threads may read. The state is written after the add is issued: the release does not have to
wait for 32 KB of stores, and nobody in this launch reads them.

Nothing here depends on the batch, neither tile sizes nor orders of summation: a row's result is bitwise the same in any batch.
The compiler may not fuse multiplications with additions (`enable_fp_fusion`), here and in the kernels that share these parts: it
would choose otherwise in each of them, and k and with it the state would differ in the last bit by the way a token came.

Legend: B rows (one token of one sequence each), S slots, H heads, D head dim, R rotated pairs, X = H * D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Blocks(NamedTuple):
    """How one launch is cut: state columns of a program, its warps, and the registers a thread may use (None: no limit).

    A program has at most one thread per head dim: with more of them Triton loads q and k anew for every row of the tile.
    Fewer registers let more programs, and so more of the state, be under way at once.
    """

    columns: int
    warps: int
    registers: int | None


def step_blocks(dim: int) -> Blocks:
    """Of a decode step: 64 state values and at most 96 registers per thread, 5 programs (160 KB of state) per SM at D = 128."""
    return Blocks(min(dim, 64), max(1, dim // 32), 96)


def step_candidates(dim: int) -> list[Blocks]:
    """What a sweep may try."""
    columns = [(16, None), (32, None), (32, 56), (64, None), (64, 96), (128, None)]
    return [Blocks(c, max(1, dim // 32), registers) for c, registers in columns if c <= dim]


# ---------------------------------------------------------------------------------------------------------------------
# Parts that the multi-token kernel shares
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def partner(dim, PAIRS: tl.constexpr):
    """The dim that RoPE turns `dim` with: half-split pairs j and j + PAIRS; the rest are their own."""
    return tl.where(dim < PAIRS, dim + PAIRS, tl.where(dim < 2 * PAIRS, dim - PAIRS, dim))


@triton.jit
def load_gains(q_weight, k_weight, dim, PAIRS: tl.constexpr, NORM: tl.constexpr):
    """The QK norm's weights of `dim` and of its partner, [D] each; nothing without a norm."""
    gains = ()
    if NORM:
        other = partner(dim, PAIRS)
        own = tl.load(q_weight + dim), tl.load(q_weight + other)
        gains = own + (tl.load(k_weight + dim), tl.load(k_weight + other))  # type: ignore[assignment]
    return gains


@triton.jit
def load_token(
    qkv, cos, sin, row, qkv_row, table_row, head, dim, column, H: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """A token's raw q, k, each with its partners, cos, sin, [D] each, and columns of v; `row` counts rows of all these.

    A partner is loaded a second time (from L1) rather than exchanged between threads.
    """
    at = qkv + row * qkv_row + head * D
    other = partner(dim, PAIRS)
    table = row * table_row + tl.where(dim < PAIRS, dim, dim - PAIRS)
    real = tl.load(cos + table, mask=dim < 2 * PAIRS, other=1.0)
    imag = tl.load(sin + table, mask=dim < 2 * PAIRS, other=0.0)
    q, q_other = tl.load(at + dim), tl.load(at + other)
    k, k_other = tl.load(at + H * D + dim), tl.load(at + H * D + other)
    return q, q_other, k, k_other, real, imag, tl.load(at + 2 * H * D + column)


@triton.jit
def add_pairs(a, b, c, d):
    """Combines two sums at once: one reduction, so half the barriers."""
    return a + c, b + d


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def prepare(token, gains, dim, eps, D: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr):
    """q, k [D] and v [columns] as the recurrence takes them, FP32: SiLU, RMS norm, RoPE, then rounded to qkv's dtype once."""
    q, q_other, k, k_other, real, imag, v = token
    dtype = q.dtype
    q, q_other, k, k_other = q.to(tl.float32), q_other.to(tl.float32), k.to(tl.float32), k_other.to(tl.float32)
    imag, v = tl.where(dim < PAIRS, -imag, imag), v.to(tl.float32)
    if SILU:
        q, q_other, k, k_other, v = _silu(q), _silu(q_other), _silu(k), _silu(k_other), _silu(v)
    if NORM:
        q_squares, k_squares = tl.reduce((q * q, k * k), 0, add_pairs)
        q_scale, k_scale = tl.rsqrt(q_squares / D + eps), tl.rsqrt(k_squares / D + eps)
        q_gain, q_other_gain, k_gain, k_other_gain = gains
        q, q_other = q * q_scale * q_gain.to(tl.float32), q_other * q_scale * q_other_gain.to(tl.float32)
        k, k_other = k * k_scale * k_gain.to(tl.float32), k_other * k_scale * k_other_gain.to(tl.float32)
    q, k = q * real + q_other * imag, k * real + k_other * imag
    return q.to(dtype).to(tl.float32), k.to(dtype).to(tl.float32), v.to(dtype).to(tl.float32)


@triton.jit
def fading(log_decay):
    """exp(g) - 1, to a few roundings of itself. Near 1 an FP32 decay is off by up to 2^-25, and always to the same side.

    After 10^5 tokens that alone would be 0.3 % of what the first of them left, and 8 times that with the GPU's own exp.
    """
    x = log_decay * 0.0 + 1.0
    for i in tl.static_range(9):  # Taylor: g (1 + g/2 (1 + g/3 (... (1 + g/10)))); the rest is below 2^-36 for |g| < 1/2
        x = 1.0 + x * log_decay * (1.0 / (10 - i))
    return tl.where(log_decay > -0.5, x * log_decay, tl.exp(log_decay) - 1.0)


@triton.jit
def stepped(state, k, v, fade):
    """exp(g) S + k^T v as S + k^T v + (exp(g) - 1) S: the same two fused operations in whichever kernel it stands."""
    added = tl.fma(tl.broadcast_to(k[:, None], state.shape), tl.broadcast_to(v[None, :], state.shape), state)
    return tl.fma(state, tl.zeros_like(state) + fade, added)


@triton.jit
def read(state, q):
    """D^-0.5 q S, [columns]."""
    return tl.sum(q[:, None] * state, axis=0) * (state.shape[0] ** -0.5)


@triton.jit
def count_in(arrivals, lane):
    """Adds this program to a counter, by one thread; the returned ticket is lane 0's and need not have arrived yet.

    `lane` has one element per thread: the ticket then stays in its thread's register and no barrier waits for it here.
    """
    tl.debug_barrier()
    return tl.atomic_add(arrivals + tl.zeros_like(lane), 1, mask=lane == 0, sem="acq_rel", scope="gpu")


@triton.jit
def is_last(ticket, lane, programs):
    """Whether a ticket is the last of `programs`; a barrier for the whole CTA."""
    return tl.max(tl.where(lane == 0, ticket, -1), axis=0) == programs - 1


@triton.jit
def norm_and_gate(
    partial, gate, norm_weight, out, first_row, first_channel, gate_row, eps,
    T: tl.constexpr, T_TILE: tl.constexpr, X: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr
):  # fmt: skip
    """One group's WIDTH channels of T tokens: RMS norm of what all its programs left in `partial`, weight, sigmoid gate."""
    column = tl.arange(0, WIDTH_PAD)
    inside = column < WIDTH
    channel = first_channel + column
    weight = tl.load(norm_weight + channel, mask=inside, other=0.0).to(tl.float32)
    for first in tl.static_range(0, T, T_TILE):
        token = first + tl.arange(0, T_TILE)
        mask = (token < T)[:, None] & inside[None, :]
        row = (first_row + token)[:, None]
        opened = tl.sigmoid(tl.load(gate + row * gate_row + channel[None, :], mask=mask, other=0.0).to(tl.float32))
        at = row * X + channel[None, :]
        o = tl.load(partial + at, mask=mask, other=0.0, cache_modifier=".cg")
        scale = tl.rsqrt(tl.sum(o * o, axis=1) / WIDTH + eps)
        y = o * scale[:, None] * weight[None, :] * opened
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# One token
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _step_kernel(
    qkv, gate, states, slots, q_weight, k_weight, norm_weight, cos, sin, log_decay, arrivals, partial, out,
    qkv_row, gate_row, table_row, state_row, eps,
    H: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr, WIDTH_PAD: tl.constexpr,
    COLUMNS: tl.constexpr, THREADS: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Program ((b * H) + head) * (D / COLUMNS) + block: columns of one head's state; the blocks of a head are neighbours."""
    X: tl.constexpr = H * D
    HEADS: tl.constexpr = H // GROUPS
    BLOCKS: tl.constexpr = D // COLUMNS
    program = tl.program_id(0)
    block, head, b = program % BLOCKS, program // BLOCKS % H, (program // (BLOCKS * H)).to(tl.int64)
    dim, column = tl.arange(0, D), block * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slots + b).to(tl.int64)
    fade = fading(tl.load(log_decay + head))
    if slot < 0:
        tl.store(out + b * X + head * D + column, tl.zeros((COLUMNS,), out.dtype.element_ty))
        return

    tile = states + slot * state_row + head * D * D + dim[:, None] * D + column[None, :]
    state = tl.load(tile, eviction_policy="evict_first").to(tl.float32)
    tl.debug_barrier()  # else the compiler asks for the tile only after it has waited for what follows
    token = load_token(qkv, cos, sin, b, qkv_row, table_row, head, dim, column, H, D, PAIRS)
    gains = load_gains(q_weight, k_weight, dim, PAIRS, NORM)
    q, k, v = prepare(token, gains, dim, eps, D, PAIRS, NORM, SILU)

    state = stepped(state, k, v, fade)
    tl.store(partial + b * X + head * D + column, read(state, q))
    lane = tl.arange(0, THREADS)
    group = head // HEADS
    counter = arrivals + slot * H + group
    ticket = count_in(counter, lane)
    tl.store(tile, state.to(states.dtype.element_ty), eviction_policy="evict_first")
    if is_last(ticket, lane, HEADS * BLOCKS):
        tl.store(counter, 0)
        norm_and_gate(
            partial, gate, norm_weight, out, b, group * HEADS * D, gate_row, eps, 1, 1, X, HEADS * D, WIDTH_PAD
        )  # fmt: skip


def lightning_decode_step(
    qkv_BX: Tensor,
    gate_BX: Tensor,
    states_SHDD: Tensor,
    arrivals_SH: Tensor,
    slots_B: Tensor,
    cos_BR: Tensor,
    sin_BR: Tensor,
    log_decay_H: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    norm_weight_X: Tensor,
    *,
    eps: float,
    groups: int,
    silu: bool,
    blocks: Blocks | None = None,
) -> Tensor:
    """As the twin, [B, X]. `arrivals_SH` are int32 zeros and are zeros again afterwards."""
    batch, width = gate_BX.shape
    heads, dim = states_SHDD.shape[1:3]
    out = torch.empty((batch, width), dtype=gate_BX.dtype, device=gate_BX.device)
    if batch == 0:
        return out
    partial = torch.empty((batch, width), dtype=torch.float32, device=gate_BX.device)
    columns, warps, registers = blocks or step_blocks(dim)
    _step_kernel[(batch * heads * (dim // columns),)](
        qkv_BX, gate_BX, states_SHDD, slots_B, q_weight_D, k_weight_D, norm_weight_X, cos_BR, sin_BR, log_decay_H,
        arrivals_SH, partial, out,
        qkv_BX.stride(0), gate_BX.stride(0), cos_BR.stride(0), states_SHDD.stride(0), eps,
        H=heads, D=dim, PAIRS=cos_BR.shape[-1], GROUPS=groups, WIDTH_PAD=triton.next_power_of_2(width // groups),
        COLUMNS=columns, THREADS=32 * warps, NORM=q_weight_D is not None, SILU=silu,
        num_warps=warps, maxnreg=registers, enable_fp_fusion=False,
    )  # fmt: skip
    return out
