"""Lightning's decode: one token, drafts with the commit of the round before, and deferred state writes.

Every call goes to another layer's pool, as in a model: 256 MB of states pass before one comes up again, more than an L2 cache
holds. Peers: fla's recurrent kernel, which updates the state and no more (q, k and v come prepared, its output is neither normed
nor gated, its state goes to new memory); plain PyTorch; for drafts, as many decode steps of our own.

Legend: B sequences, T tokens of a sequence, H heads, D = 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from openling.bench.case import Case, Floor, Goal
from openling.ops.lightning import log_decay
from openling.ops.lightning_decode import DecodeLayer, PendingTokens, PendingWindow, StatePool, decode_step, verify_step
from openling.ops.pick import plain_twins

D, PAIRS, LAYERS, HEADS_PER_GROUP = 128, 32, 80, 8
CYCLE_BYTES = 256e6
T = TypeVar("T")
OPS = ("lightning decode", "lightning drafts", "lightning deferred")


def cases(quick: bool) -> Iterator[Case]:
    """All of them, or with `quick` those that have a goal."""
    for batch in (1, 32, 64) if quick else (1, 8, 32, 64, 128):
        yield step(batch, "graph")
    if not quick:
        for batch in (1, 8, 32, 64, 128):
            yield step(batch, "eager")
        yield step(1, "graph", heads=32)
        yield step(64, "graph", heads=32)
        yield step(64, "graph", dtype=torch.bfloat16)
    yield drafts(128, 2)
    yield drafts(1, 4)
    for wait in (8,) if quick else (4, 8, 16):
        yield deferred(64, wait)


class Setup(NamedTuple):
    """Projections of T tokens, pools and rings in turn, and the rest of a call's arguments."""

    qkv: Tensor
    gate: Tensor
    layer: DecodeLayer
    slots: Tensor
    cos: Tensor
    sin: Tensor
    pools: list[StatePool]
    rings: list[PendingTokens]
    window: PendingWindow


def setup(batch: int, heads: int, *, tokens: int = 1, room: int = 1, dtype: torch.dtype = torch.float32) -> Setup:
    """Random everything, in BF16 but for states, tables and decays."""
    torch.manual_seed(0)
    width = heads * D

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    angle = 1e4 * torch.rand(batch, tokens, PAIRS, device="cuda")
    gains = 1 + 0.1 * random(D), 1 + 0.1 * random(D), 1 + 0.1 * random(width)
    layer = DecodeLayer(log_decay(heads, 0, LAYERS).cuda(), *gains, 1e-6, heads // HEADS_PER_GROUP)
    window = PendingWindow.new(batch, room=room, tokens=tokens, device="cuda")
    pools, rings = [], []
    for _ in range(-(-int(CYCLE_BYTES) // (batch * heads * D * D * dtype.itemsize))):
        pool = StatePool.new(batch, heads, D, dtype=dtype, device="cuda")
        pool.states.normal_()
        pools.append(pool)
        ring = PendingTokens.new(batch, heads, D, window, dtype=torch.bfloat16)
        ring.keys.normal_()
        ring.values.normal_()
        rings.append(ring)
    slots = torch.randperm(batch, device="cuda")
    qkv, gate = random(batch, tokens, 3 * width), random(batch, tokens, width)
    return Setup(qkv, gate, layer, slots, angle.cos(), angle.sin(), pools, rings, window)


def step(batch: int, mode: Literal["graph", "eager"], *, heads: int = 64, dtype: torch.dtype = torch.float32) -> Case:
    """One token of each sequence. The peer is fla in a graph (with FP32 states, as it has none other), else plain PyTorch."""
    s = setup(batch, heads, dtype=dtype)
    goal = None
    if mode == "graph" and heads == 64 and dtype == torch.float32:
        goal = Goal(us=8) if batch == 1 else Goal(fraction=0.85) if batch >= 32 else None
    peer = _plain(s) if mode == "eager" else _fla(s) if dtype == torch.float32 else None
    per_head = 2 * dtype.itemsize * D * D + _activation_bytes(1)
    return Case(
        op="lightning decode",
        shape=f"B{batch} H{heads}" + (" BF16 state" if dtype == torch.bfloat16 else ""),
        ours=_in_turn(s.pools, lambda pool: _step(s, pool, 0)),
        peer=peer,
        peer_name=None if peer is None else "plain PyTorch" if mode == "eager" else "fla, state only",
        floor=Floor(bytes=batch * heads * per_head, flops=batch * heads * 4 * D * D),
        goal=goal,
        mode=mode,
    )


def drafts(batch: int, tokens: int, *, heads: int = 64) -> Case:
    """T tokens to verify, and all T of the round before to commit. The peer decodes T tokens one by one."""
    s = setup(batch, heads, tokens=tokens, room=tokens)
    s.window.count.fill_(tokens)
    waiting = tokens * 4 * D
    return Case(
        op="lightning drafts",
        shape=f"B{batch} T{tokens} H{heads}",
        ours=_in_turn(list(zip(s.pools, s.rings, strict=True)), lambda pair: _verify(s, *pair)),
        peer=_in_turn(s.pools, lambda pool: [_step(s, pool, t) for t in range(tokens)]),
        peer_name=f"{tokens} decode steps",
        floor=Floor(bytes=batch * heads * (8 * D * D + 2 * waiting + _activation_bytes(tokens))),
        goal=Goal(fraction=0.85) if batch >= 32 else Goal(us=34),
        mode="graph",
    )


def deferred(batch: int, wait: int, *, heads: int = 64) -> Case:
    """One token where up to `wait` wait; sequences are at all stages, so that every call writes 1 of `wait` states."""
    s = setup(batch, heads, room=wait)
    s.window.count.copy_(1 + torch.arange(batch + 1, device="cuda") % wait)
    state, token = 4 * D * D, 4 * D
    read = state + state / wait + token * (wait + 1) / 2 + token + _activation_bytes(1)
    return Case(
        op="lightning deferred",
        shape=f"B{batch} m{wait} H{heads}",
        ours=_in_turn(list(zip(s.pools, s.rings, strict=True)), lambda pair: _verify(s, *pair)),
        peer=_in_turn(s.pools, lambda pool: _step(s, pool, 0)),
        peer_name="1 decode step",
        floor=Floor(bytes=int(batch * heads * read)),
        goal=Goal(us=80) if wait == 8 else None,
        mode="graph",
    )


def _activation_bytes(tokens: int) -> int:
    """q, k, v, gate and output of one head in BF16."""
    return tokens * 5 * 2 * D


def _in_turn(buffers: list[T], call: Callable[[T], object]) -> Callable[[], object]:
    turn = cycle(buffers)
    return lambda: call(next(turn))


def _step(s: Setup, pool: StatePool, t: int) -> Tensor:
    return decode_step(s.qkv[:, t], s.gate[:, t], s.layer, pool, s.slots, s.cos[:, t], s.sin[:, t])


def _verify(s: Setup, pool: StatePool, ring: PendingTokens) -> Tensor:
    return verify_step(s.qkv, s.gate, s.layer, pool, s.slots, ring, s.window, s.cos, s.sin)


def _plain(s: Setup) -> Callable[[], object]:
    def call(pool: StatePool) -> Tensor:
        with plain_twins():
            return _step(s, pool, 0)

    return _in_turn(s.pools, call)


def _fla(s: Setup) -> Callable[[], object] | None:
    """fla's recurrence on q, k and v that are prepared already; None where fla is not installed."""
    try:
        from fla.ops.simple_gla import fused_recurrent_simple_gla
    except ImportError:
        return None
    q, k, v = s.layer.heads(s.qkv, s.cos, s.sin)

    def call(pool: StatePool) -> Tensor:
        g = s.layer.log_decay
        return fused_recurrent_simple_gla(q, k, v, g_gamma=g, initial_state=pool.states, output_final_state=True)[0]

    return _in_turn(s.pools, call)
