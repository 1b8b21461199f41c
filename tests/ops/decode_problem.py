"""Random decode problems: projections of new tokens for rows that stand in shuffled slots of a pool, and error limits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from openling.ops.lightning import lightning_recurrent
from openling.ops.lightning_decode import DecodeLayer, PendingTokens, PendingWindow, StatePool

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
U = 2.0**-24  # the unit roundoff of FP32
NAN = float("nan")


class Problem(NamedTuple):
    """Projections of T new tokens for B rows, a layer, a pool and where the rows stand in it."""

    qkv: Tensor
    gate: Tensor
    layer: DecodeLayer
    pool: StatePool
    slots: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def live(self) -> Tensor:
        return self.slots >= 0

    @property
    def states(self) -> Tensor:
        """A copy of the states of rows that are not padding."""
        return self.pool.states[self.slots[self.live]].clone()

    def double(self) -> Problem:
        wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in vars(self.layer).items()}
        pool = StatePool(self.pool.states.to(torch.float64, copy=True), self.pool.arrivals.clone())
        return self._replace(qkv=self.qkv.double(), gate=self.gate.double(), layer=DecodeLayer(**wide), pool=pool)

    def tokens(self, new: slice) -> Problem:
        """The same with some of the tokens."""
        return self._replace(qkv=self.qkv[:, new], gate=self.gate[:, new], cos=self.cos[:, new], sin=self.sin[:, new])

    def rows(self, index: Tensor) -> Problem:
        """The same with some of the rows."""
        chosen = {name: getattr(self, name)[index] for name in ("qkv", "gate", "slots", "cos", "sin")}
        return self._replace(**chosen)

    def step(self, t: int = 0) -> tuple[Any, ...]:
        """Arguments of a decode step of token t."""
        return self.qkv[:, t], self.gate[:, t], self.layer, self.pool, self.slots, self.cos[:, t], self.sin[:, t]

    def call(self, pending: PendingTokens, window: PendingWindow) -> tuple[Any, ...]:
        """Arguments of a verify step of all tokens."""
        return self.qkv, self.gate, self.layer, self.pool, self.slots, pending, window, self.cos, self.sin


def problem(
    batch=3, heads=4, dim=16, *, tokens=1, pairs=4, groups=2, norm=True, silu=False, padding=(), dtype=torch.float32, seed=0
) -> Problem:
    """Rows in shuffled slots of a pool that has 3 more; those hold NaN, as do the inputs of padding rows.

    Pool, projections and gate are views with strides. Decays reach from next to none to losing nearly everything at once.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    width = heads * dim
    joint = normal(batch, tokens, 4 * width)
    slots = torch.randperm(batch + 3, generator=g)[:batch]
    slots[list(padding)] = -1
    joint[slots < 0] = NAN
    states = torch.full((batch + 3, 2, heads, dim, dim), NAN, dtype=torch.float64)
    states[slots[slots >= 0], 1] = 3 * normal(int((slots >= 0).sum()), heads, dim, dim)
    angle = 100 * normal(batch, tokens, pairs).float()
    decay = -torch.logspace(-8, 0.5, heads)
    gains = [(1 + 0.3 * normal(dim)).to(DEVICE, dtype) if norm else None for _ in range(2)]
    layer = DecodeLayer(decay.to(DEVICE), *gains, (1 + 0.3 * normal(width)).to(DEVICE, dtype), 1e-6, groups, silu)
    states = states.to(DEVICE, torch.promote_types(dtype, torch.float32))[:, 1]
    pool = StatePool(states, torch.zeros(batch + 3, heads, dtype=torch.int32, device=DEVICE))
    qkv, gate = joint.to(DEVICE, dtype).split((3 * width, width), dim=-1)
    return Problem(qkv, gate, layer, pool, slots.to(DEVICE), angle.cos().to(DEVICE), angle.sin().to(DEVICE))


def rings(p: Problem, room: int, tokens: int) -> tuple[PendingTokens, PendingWindow]:
    """Rings full of NaN; where each starts is arbitrary."""
    slots, heads, dim = p.pool.states.shape[:3]
    window = PendingWindow.new(slots, room=room, tokens=tokens, device=DEVICE)
    window.start[:] = torch.arange(slots + 1, device=DEVICE) % window.ring
    pending = PendingTokens.new(slots, heads, dim, window, dtype=p.qkv.dtype)
    pending.keys.fill_(NAN)
    pending.values.fill_(NAN)
    return pending, window


def limit(exact: Problem, seen: int = 0) -> Tensor:
    """By how much FP32 outputs of live rows may be off, [rows, T, X], when the states have taken `seen` tokens in FP32."""
    live, layer = exact.live, exact.layer
    q, k, v = layer.heads(exact.qkv[live], exact.cos[live], exact.sin[live])
    o, _ = lightning_recurrent(q, k, v, layer.log_decay, initial_state=exact.states)
    sums, _ = lightning_recurrent(q.abs(), k.abs(), v.abs(), layer.log_decay, initial_state=exact.states.abs())
    o, sums = (x.flatten(2).unflatten(-1, (layer.groups, -1)) for x in (o, sums))
    rms = o.pow(2).mean(-1, keepdim=True).sqrt()
    roundings = k.shape[-1] + 40 + 2 * (seen + k.shape[1])
    relative = 2 * roundings * U * sums.amax(-1, keepdim=True) / rms + 40 * U * o.abs() / rms
    return relative.flatten(2) * layer.norm_weight.abs() * torch.sigmoid(exact.gate[live])


def close(out: Tensor, expected: Tensor, most: Tensor | float) -> bool:
    return bool(((out.double() - expected).abs() <= most).all())


def untouched(p: Problem) -> bool:
    """Slots without a row still hold NaN, those of the rows do not, and the counters are back at zero."""
    used = torch.zeros(p.pool.states.shape[0], dtype=torch.bool, device=DEVICE)
    used[p.slots[p.live]] = True
    return bool(p.pool.states[~used].isnan().all() and p.pool.states[used].isfinite().all() and not p.pool.arrivals.any())
