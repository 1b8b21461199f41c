"""Lightning's decode: from a layer's projections of new tokens to what its `dense` takes, over a pool of states.

    q, k = rope(norm(q)), rope(norm(k))     S <- exp(g) S + k^T v     o = D^-0.5 q S     out = group_norm(o) * sigmoid(gate)

`decode_step` takes one token of each of B sequences. `verify_step` takes T tokens (a certain one and T - 1 drafts) and does not
touch the state for them: their k and v wait in a ring until it is known how many were right. Waiting tokens are folded into the
state by a later call, when the ring has no room for more: with room for T that is the next call, so that a round of
speculative decoding reads the state once and writes it once; with T = 1 and room for m the state is written every m-th step
(deferred writes: KVBuffer, arXiv 2605.19049). Both are the same arithmetic:

    S_c = exp(g c) S_0 + sum over waiting j < c of exp(g (c - 1 - j)) k_j^T v_j
    o_i = D^-0.5 (exp(g (i + 1)) q_i S_c + sum over new j <= i of exp(g (i - j)) (q_i . k_j) v_j)

A sequence owns a slot of the pool; the rows of a batch need different slots. Slot -1 marks a row that pads a batch to the size
of a CUDA graph: nothing is read or written for it and its output is zero. Slots and counts stay on the device.

Legend: B rows, T new tokens of a row, S slots, H heads, D head dim, X = H * D, R rotated pairs, C rows of a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from openling.ops.fused import decode_kernels
from openling.ops.lightning import _step, lightning_chunk
from openling.ops.norm import group_rms_norm, rms_norm
from openling.ops.rope import apply_rope
from openling.ops.rows import exp_rows, sigmoid_rows, silu_rows


@dataclass
class StatePool:
    """One layer's `states` by slot, [S, H, D, D] in FP32 (or BF16: half the traffic, drifts), and the kernels' counters.

    The counters, `arrivals`, are int32 zeros [S, H] between calls. They belong to the pool because slots do: two streams that
    step different sequences of one pool cannot meet in them.
    """

    states: Tensor
    arrivals: Tensor

    @classmethod
    def new(
        cls, slots: int, heads: int, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> StatePool:
        """All states zero, as at the start of a sequence."""
        states = torch.zeros(slots, heads, dim, dim, dtype=dtype, device=device)
        return cls(states, torch.zeros(slots, heads, dtype=torch.int32, device=device))


@dataclass(frozen=True)
class DecodeLayer:
    """What a Lightning layer's decode needs besides its projections: decay [H] as log_decay, weights of the QK norm [D] or None,
    of the output norm [X], and `groups` as in `group_rms_norm`.
    """

    log_decay: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    norm_weight: Tensor
    eps: float
    groups: int
    silu: bool = False

    def heads(self, qkv_BTX: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, H, D] as the recurrence takes them, from rows [Q | K | V], head-major."""
        count = self.log_decay.shape[0]
        q, k, v = (silu_rows(qkv_BTX) if self.silu else qkv_BTX).unflatten(-1, (3, count, -1)).unbind(2)
        if self.q_weight is not None and self.k_weight is not None:
            q, k = rms_norm(q, self.q_weight, self.eps), rms_norm(k, self.k_weight, self.eps)
        cos, sin = cos_BTR.unsqueeze(2), sin_BTR.unsqueeze(2)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def gated(self, o_BTHD: Tensor, gate_BTX: Tensor) -> Tensor:
        """The recurrence's output after group norm and gate, [B, T, X]."""
        return group_rms_norm(o_BTHD.flatten(2), self.norm_weight, self.eps, self.groups) * sigmoid_rows(gate_BTX)


@dataclass
class PendingWindow:
    """Which rows of the rings wait in each slot: `count` of them from `start` on, modulo the ring. One window for all layers.

    At most `room` tokens wait, at most `tokens` are new in one call, and a ring has room + tokens rows: a call never overwrites
    what it reads. Both tensors are int32 [S + 1]: the last entry takes what is said about padding rows (slot -1).
    """

    start: Tensor
    count: Tensor
    room: int
    tokens: int

    @classmethod
    def new(cls, slots: int, *, room: int, tokens: int, device: torch.device | str = "cpu") -> PendingWindow:
        """Nothing waits."""
        if not 1 <= tokens <= room:
            raise ValueError(f"a call's {tokens} tokens must be at least 1 and fit into the room for {room}")
        start, count = (torch.zeros(slots + 1, dtype=torch.int32, device=device) for _ in range(2))
        return cls(start, count, room, tokens)

    @property
    def ring(self) -> int:
        """Rows of a ring."""
        return self.room + self.tokens

    def advance(self, slots_B: Tensor, accepted_B: Tensor | int) -> None:
        """After the last layer of a round: the first `accepted_B` of its tokens wait now, the others are forgotten."""
        start, count = self.start[slots_B], self.count[slots_B]
        folded = count + self.tokens > self.room
        self.start[slots_B] = torch.where(folded, start + count, start) % self.ring
        self.count[slots_B] = (count.masked_fill(folded, 0) + accepted_B).to(torch.int32)

    def clear(self, slots_B: Tensor) -> None:
        """Nothing waits in these slots: after the last layer's `commit`, or for a new sequence."""
        self.count[slots_B] = 0


@dataclass
class PendingTokens:
    """One layer's rings: k (normed, rotated) and v of the tokens that `PendingWindow` speaks of, [S, H, C, D]."""

    keys: Tensor
    values: Tensor

    @classmethod
    def new(cls, slots: int, heads: int, dim: int, window: PendingWindow, *, dtype: torch.dtype) -> PendingTokens:
        """Uninitialised rings on the window's device."""
        shape = (slots, heads, window.ring, dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=window.count.device) for _ in range(2))
        return cls(keys, values)


# ---------------------------------------------------------------------------------------------------------------------
# Entries
# ---------------------------------------------------------------------------------------------------------------------


def decode_step(
    qkv_BX: Tensor, gate_BX: Tensor, layer: DecodeLayer, pool: StatePool, slots_B: Tensor, cos_BR: Tensor, sin_BR: Tensor
) -> Tensor:
    """One token of every row: its output [B, X]; its state is updated in place. qkv_BX has 3 X columns.

    cos and sin are FP32, a row per sequence since each is at its own position; a zero stride over B is fine.
    """
    fast = _kernels(qkv_BX, layer, pool)
    if fast is None:
        return decode_step_plain(qkv_BX, gate_BX, layer, pool, slots_B, cos_BR, sin_BR)
    return fast.lightning_decode_step(
        qkv_BX, gate_BX, pool.states, pool.arrivals, slots_B, cos_BR, sin_BR, layer.log_decay,
        layer.q_weight, layer.k_weight, layer.norm_weight, eps=layer.eps, groups=layer.groups, silu=layer.silu,
    )  # fmt: skip


def verify_step(
    qkv_BTX: Tensor,
    gate_BTX: Tensor,
    layer: DecodeLayer,
    pool: StatePool,
    slots_B: Tensor,
    pending: PendingTokens,
    window: PendingWindow,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
) -> Tensor:
    """T new tokens of every row: their outputs [B, T, X]; their k and v enter the ring behind those that wait there.

    Where the ring has no room for another call's tokens, what waits is folded into the state first. `window` is only read:
    call `window.advance` after the last layer.
    """
    if not 1 <= qkv_BTX.shape[1] <= window.tokens:
        raise ValueError(f"a call brings 1 to {window.tokens} tokens, as the window was made for, not {qkv_BTX.shape[1]}")
    fast = _kernels(qkv_BTX, layer, pool)
    if fast is None:
        return verify_step_plain(qkv_BTX, gate_BTX, layer, pool, slots_B, pending, window, cos_BTR, sin_BTR)
    return fast.lightning_verify_step(
        qkv_BTX, gate_BTX, pool.states, pool.arrivals, slots_B, cos_BTR, sin_BTR,
        pending.keys, pending.values, window.start, window.count, layer.log_decay,
        layer.q_weight, layer.k_weight, layer.norm_weight,
        eps=layer.eps, groups=layer.groups, silu=layer.silu, room=window.room,
    )  # fmt: skip


def commit(layer: DecodeLayer, pool: StatePool, slots_B: Tensor, pending: PendingTokens, window: PendingWindow) -> None:
    """Fold what waits in these slots into their states; after the last layer, `window.clear` the slots."""
    fast = _kernels(pending.keys, layer, pool)
    if fast is None:
        return commit_plain(layer, pool, slots_B, pending, window)
    return fast.lightning_commit(
        pool.states, slots_B, pending.keys, pending.values, window.start, window.count, layer.log_decay, room=window.room
    )


def _kernels(x: Tensor, layer: DecodeLayer, pool: StatePool) -> ModuleType | None:
    """The kernels where they serve."""
    heads, dim = pool.states.shape[1:3]
    return decode_kernels(x, heads, dim, layer.groups)


# ---------------------------------------------------------------------------------------------------------------------
# Plain twins
# ---------------------------------------------------------------------------------------------------------------------


def decode_step_plain(
    qkv_BX: Tensor, gate_BX: Tensor, layer: DecodeLayer, pool: StatePool, slots_B: Tensor, cos_BR: Tensor, sin_BR: Tensor
) -> Tensor:
    """The definition of `decode_step`."""
    rows = (slots_B >= 0).nonzero()[:, 0]
    slots = slots_B[rows]
    q, k, v = layer.heads(*(x[rows, None] for x in (qkv_BX, cos_BR, sin_BR)))
    o, states = _step(q, k, v, layer.log_decay, pool.states[slots])
    pool.states[slots] = states.to(pool.states.dtype)
    out_BX = torch.zeros_like(gate_BX)
    out_BX[rows] = layer.gated(o, gate_BX[rows, None])[:, 0]
    return out_BX


def verify_step_plain(
    qkv_BTX: Tensor,
    gate_BTX: Tensor,
    layer: DecodeLayer,
    pool: StatePool,
    slots_B: Tensor,
    pending: PendingTokens,
    window: PendingWindow,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
) -> Tensor:
    """The definition of `verify_step`."""
    rows = (slots_B >= 0).nonzero()[:, 0]
    slots, tokens = slots_B[rows], qkv_BTX.shape[1]
    q, k, v = layer.heads(qkv_BTX[rows], cos_BTR[rows], sin_BTR[rows])
    states = _folded(layer, pool, slots, pending, window)
    o, _ = lightning_chunk(q, k, v, layer.log_decay, initial_state=states, chunk=tokens)

    start, count = window.start[slots], window.count[slots]
    full = count + window.tokens > window.room
    pool.states[slots[full]] = states[full].to(pool.states.dtype)
    ring_BT = (start + count)[:, None] + torch.arange(tokens, device=start.device)
    at = slots[:, None], slice(None), (ring_BT % window.ring).long()
    pending.keys[at], pending.values[at] = k, v  # the index's two tensors put H behind them: [B, T, H, D]
    out_BTX = torch.zeros_like(gate_BTX)
    out_BTX[rows] = layer.gated(o, gate_BTX[rows])
    return out_BTX


def commit_plain(layer: DecodeLayer, pool: StatePool, slots_B: Tensor, pending: PendingTokens, window: PendingWindow) -> None:
    """The definition of `commit`."""
    slots = slots_B[slots_B >= 0]
    pool.states[slots] = _folded(layer, pool, slots, pending, window).to(pool.states.dtype)


def _folded(layer: DecodeLayer, pool: StatePool, slots_B: Tensor, pending: PendingTokens, window: PendingWindow) -> Tensor:
    """The states after the waiting tokens, [B, H, D, D] in FP32 (or FP64)."""
    wide = torch.float64 if pending.keys.dtype == torch.float64 else torch.float32
    start_B, count_B = window.start[slots_B], window.count[slots_B]
    token_M = torch.arange(window.room, device=start_B.device)
    at = slots_B[:, None], slice(None), ((start_B[:, None] + token_M) % window.ring).long()
    waits_BM = token_M < count_B[:, None]
    k, v = (x[at].to(wide).masked_fill(~waits_BM[..., None, None], 0) for x in (pending.keys, pending.values))
    g_H = layer.log_decay.to(device=k.device, dtype=wide)
    age_BM = (count_B[:, None] - 1 - token_M).clamp(min=0).to(wide)
    faded_BMHD = k * exp_rows(g_H * age_BM[..., None])[..., None]
    kept_BH = exp_rows(g_H * count_B[:, None].to(wide))
    states = pool.states[slots_B].to(wide)
    return kept_BH[..., None, None] * states + torch.einsum("bmhd,bmhe->bhde", faded_BMHD, v)
