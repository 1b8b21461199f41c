"""Lightning's decode of several tokens, and of tokens whose state update waits; twins in `openling.ops.lightning_decode`.

Same plan as the decode step: a program owns COLUMNS columns of one head's state, asks for them first and prepares the tokens
meanwhile; the last program of a group normalises and gates. The state is read as it lies in memory; what came after it, waiting
tokens and new ones alike, are the rows of one small tile of k and one of v:

    o_i = D^-0.5 (exp(g (c + i + 1)) q_i S + sum over rows j <= c + i of exp(g (c + i - j)) (q_i . k_j) v_j)

So a call that does not write the state does not compute it either: one product with the tile per new token and little else.
If the ring is full, the waiting tokens are folded into the tile one by one, just as the decode step would have done it, and it
is written: a state has the same bits whichever way its tokens came. This comes after the outputs, which the last program of
the group waits for.

New tokens go to the ring, their k by the first column block of a head. Other blocks may still be reading that ring then: it has
rows enough that new tokens never land on waiting ones.

Legend: B rows, T new tokens of a row, S slots, H heads, D head dim, X = H * D, C ring rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openling.ops.kernels.lightning_decode import (
    Blocks,
    add_pairs,
    count_in,
    fading,
    is_last,
    load_gains,
    load_token,
    norm_and_gate,
    prepare,
    stepped,
)

# Values of one tile in the output norm: a group of all heads and many tokens must not spill.
NORM_TILE = 2048


def verify_blocks(dim: int, tokens: int, room: int) -> Blocks:
    """Of a call with new tokens; the batch has no say. More tokens need registers that a smaller tile leaves.

    At D = 128 and 64 columns, 128 registers spill nothing and let 4 programs (128 KB of state) be under way on an SM. A ring of
    more than 8 rows needs 168; that is still faster than half the columns (B64, m = 16: 120 against 157 us on an H200).
    """
    wide = tokens == 1 or (tokens == 2 and room <= 8)
    limit = None if dim < 128 or not wide else 128 if room <= 8 else 168
    return Blocks(min(dim, 64 if wide else 32), max(1, dim // 32), limit)


def commit_blocks(dim: int) -> Blocks:
    """Of a commit."""
    return Blocks(min(dim, 64), max(1, dim // 32), None)


def verify_candidates(dim: int) -> list[Blocks]:
    """What a sweep may try, for calls with new tokens and for commits."""
    columns = [(16, None), (32, None), (32, 80), (64, None), (64, 128), (64, 112)]
    return [Blocks(c, max(1, dim // 32), registers) for c, registers in columns if c <= dim]


@triton.jit
def _folded(state, keys, values, start, count, dim, column, fade, D: tl.constexpr, C: tl.constexpr):
    """A tile of the state [D, columns] after the `count` tokens that wait in a ring from row `start` on.

    A loop, not unrolled: loads for all rows at once would take registers from the calls that fold nothing.
    """
    for j in range(count):
        at = (start + j) % C * D
        k, v = tl.load(keys + at + dim), tl.load(values + at + column)
        state = stepped(state, k.to(tl.float32), v.to(tl.float32), fade)
    return state


@triton.jit
def _sums(parts, rows, N: tl.constexpr):
    """Sums over the first axis of x[:, None] * rows for each x of N parts. Two share the barriers of a reduction."""
    out = ()
    for i in tl.static_range(0, N - 1, 2):
        out += tl.reduce((parts[i][:, None] * rows, parts[i + 1][:, None] * rows), 0, add_pairs)
    if N % 2:
        out += (tl.sum(parts[N - 1][:, None] * rows, axis=0),)  # type: ignore[assignment]
    return out


@triton.jit
def _verify_kernel(
    qkv, gate, states, slots, q_weight, k_weight, norm_weight, cos, sin, log_decay, arrivals, partial, out,
    keys, values, starts, counts,
    qkv_row, gate_row, table_row, state_row, eps,
    H: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr, WIDTH_PAD: tl.constexpr,
    T: tl.constexpr, NORM_TOKENS: tl.constexpr,
    ROOM: tl.constexpr, NEW: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, THREADS: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Programs as in the decode step. NEW = tokens that a call may bring, so C = ROOM + NEW; ROWS >= ROOM + T."""
    X: tl.constexpr = H * D
    C: tl.constexpr = ROOM + NEW
    HEADS: tl.constexpr = H // GROUPS
    BLOCKS: tl.constexpr = D // COLUMNS
    program = tl.program_id(0)
    block, head, b = program % BLOCKS, program // BLOCKS % H, (program // (BLOCKS * H)).to(tl.int64)
    dim, column = tl.arange(0, D), block * COLUMNS + tl.arange(0, COLUMNS)
    at_out = b * T * X + head * D + column
    slot = tl.load(slots + b).to(tl.int64)
    g = tl.load(log_decay + head)
    if slot < 0:
        for i in tl.static_range(T):
            tl.store(out + at_out + i * X, tl.zeros((COLUMNS,), out.dtype.element_ty))
        return

    start, count = tl.load(starts + slot), tl.load(counts + slot)
    tile = states + slot * state_row + head * D * D + dim[:, None] * D + column[None, :]
    state = tl.load(tile, eviction_policy="evict_first").to(tl.float32)
    tl.debug_barrier()  # else the compiler asks for the tile only after it has waited for what follows
    gains = load_gains(q_weight, k_weight, dim, PAIRS, NORM)
    tokens = ()
    for i in tl.static_range(T):
        token = load_token(qkv, cos, sin, b * T + i, qkv_row, table_row, head, dim, column, H, D, PAIRS)
        tokens += (token,)  # type: ignore[assignment]
    ring = (slot * H + head) * C * D
    row = tl.arange(0, ROWS)
    at = (start + row) % C * D
    waits = (row < count)[:, None]
    row_keys = tl.load(keys + ring + at[:, None] + dim[None, :], mask=waits, other=0.0)
    row_values = tl.load(values + ring + at[:, None] + column[None, :], mask=waits, other=0.0)
    queries, scores = (), ()
    for i in tl.static_range(T):
        q, k, v = prepare(tokens[i], gains, dim, eps, D, PAIRS, NORM, SILU)
        new = ring + (start + count + i) % C * D
        k, v = k.to(keys.dtype.element_ty), v.to(values.dtype.element_ty)  # exact: a ring has the type of qkv
        if block == 0:
            tl.store(keys + new + dim, k)
        tl.store(values + new + column, v)
        age = count + i - row
        row_keys = tl.where((age == 0)[:, None], k[None, :], row_keys)
        row_values = tl.where((age == 0)[:, None], v[None, :], row_values)
        weight = tl.where(age >= 0, tl.exp(g * age), 0.0) * (D**-0.5)  # rows to come are zero; their exp may overflow
        queries += (q * (tl.exp(g * (count + i + 1)) * (D**-0.5)),)  # type: ignore[assignment]
        scores += (tl.sum(row_keys * q[None, :], axis=1) * weight,)  # type: ignore[assignment]
    recent, old = _sums(scores, row_values, T), _sums(queries, state, T)
    for i in tl.static_range(T):
        tl.store(partial + at_out + i * X, old[i] + recent[i])

    lane = tl.arange(0, THREADS)
    group = head // HEADS
    counter = arrivals + slot * H + group
    ticket = count_in(counter, lane)
    if count + NEW > ROOM:
        state = _folded(state, keys + ring, values + ring, start, count, dim, column, fading(g), D, C)
        tl.store(tile, state.to(states.dtype.element_ty), eviction_policy="evict_first")
    if is_last(ticket, lane, HEADS * BLOCKS):
        tl.store(counter, 0)
        norm_and_gate(
            partial, gate, norm_weight, out, b * T, group * HEADS * D, gate_row, eps,
            T, NORM_TOKENS, X, HEADS * D, WIDTH_PAD,
        )  # fmt: skip


def lightning_verify_step(
    qkv_BTX: Tensor,
    gate_BTX: Tensor,
    states_SHDD: Tensor,
    arrivals_SH: Tensor,
    slots_B: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    keys_SHCD: Tensor,
    values_SHCD: Tensor,
    start_S: Tensor,
    count_S: Tensor,
    log_decay_H: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    norm_weight_X: Tensor,
    *,
    eps: float,
    groups: int,
    silu: bool,
    room: int,
    blocks: Blocks | None = None,
) -> Tensor:
    """As the twin, [B, T, X]. `arrivals_SH` are int32 zeros and are zeros again afterwards."""
    batch, tokens, width = gate_BTX.shape
    heads, ring, dim = keys_SHCD.shape[1:]
    out = torch.empty((batch, tokens, width), dtype=gate_BTX.dtype, device=gate_BTX.device)
    if batch == 0:
        return out
    partial = torch.empty((batch, tokens, width), dtype=torch.float32, device=gate_BTX.device)
    qkv, gate, cos, sin = (x.flatten(0, 1) for x in (qkv_BTX, gate_BTX, cos_BTR, sin_BTR))
    columns, warps, registers = blocks or verify_blocks(dim, tokens, room)
    pad, group_pad = triton.next_power_of_2(tokens), triton.next_power_of_2(width // groups)
    _verify_kernel[(batch * heads * (dim // columns),)](
        qkv, gate, states_SHDD, slots_B, q_weight_D, k_weight_D, norm_weight_X, cos, sin, log_decay_H,
        arrivals_SH, partial, out, keys_SHCD, values_SHCD, start_S, count_S,
        qkv.stride(0), gate.stride(0), cos.stride(0), states_SHDD.stride(0), eps,
        H=heads, D=dim, PAIRS=cos.shape[-1], GROUPS=groups, WIDTH_PAD=group_pad,
        T=tokens, NORM_TOKENS=min(pad, max(1, NORM_TILE // group_pad)),
        ROOM=room, NEW=ring - room, ROWS=triton.next_power_of_2(room + tokens),
        COLUMNS=columns, THREADS=32 * warps, NORM=q_weight_D is not None, SILU=silu,
        num_warps=warps, maxnreg=registers, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _commit_kernel(
    states, slots, keys, values, starts, counts, log_decay, state_row,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Programs as in the decode step."""
    BLOCKS: tl.constexpr = D // COLUMNS
    program = tl.program_id(0)
    block, head = program % BLOCKS, program // BLOCKS % H
    dim, column = tl.arange(0, D), block * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slots + program // (BLOCKS * H)).to(tl.int64)
    count = tl.load(counts + slot, mask=slot >= 0, other=0)
    if count > 0:
        tile = states + slot * state_row + head * D * D + dim[:, None] * D + column[None, :]
        state = tl.load(tile, eviction_policy="evict_first").to(tl.float32)
        ring, start = (slot * H + head) * C * D, tl.load(starts + slot)
        fade = fading(tl.load(log_decay + head))
        state = _folded(state, keys + ring, values + ring, start, count, dim, column, fade, D, C)
        tl.store(tile, state.to(states.dtype.element_ty), eviction_policy="evict_first")


def lightning_commit(
    states_SHDD: Tensor,
    slots_B: Tensor,
    keys_SHCD: Tensor,
    values_SHCD: Tensor,
    start_S: Tensor,
    count_S: Tensor,
    log_decay_H: Tensor,
    *,
    room: int,
    blocks: Blocks | None = None,
) -> None:
    """As the twin."""
    heads, ring, dim = keys_SHCD.shape[1:]
    columns, warps, registers = blocks or commit_blocks(dim)
    if slots_B.shape[0] == 0:
        return
    _commit_kernel[(slots_B.shape[0] * heads * (dim // columns),)](
        states_SHDD, slots_B, keys_SHCD, values_SHCD, start_S, count_S, log_decay_H, states_SHDD.stride(0),
        H=heads, D=dim, C=ring, COLUMNS=columns, num_warps=warps, maxnreg=registers, enable_fp_fusion=False,
    )  # fmt: skip
