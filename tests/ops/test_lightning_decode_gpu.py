"""The decode kernels as compiled: BF16 at the shapes of Ling-2.6-1T, against the plain forms in FP64 on the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_problem import DEVICE, GPU, U, close, problem, rings, untouched
from torch import Tensor

from openling.ops.lightning_decode import StatePool, commit, decode_step, decode_step_plain, verify_step
from openling.ops.pick import plain_twins

pytestmark = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
REAL: dict[str, Any] = {"heads": 64, "dim": 128, "pairs": 32, "groups": 8, "dtype": torch.bfloat16}


def off(out: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected values."""
    return ((out.double() - expected).pow(2).mean() / expected.pow(2).mean()).sqrt().item()


@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_bf16_steps(batch, storage):
    """q, k and the output are rounded to BF16 once each.

    A rounding to 8 bits errs by at most 2^-8 of the value, even spread below that: 2^-8 / sqrt(3) rms; three in quadrature are
    2^-8. The plain form rounds more often and must be off by more. An entry of a state shows the rounding of k, at most
    2^-8 |k_d v_e|, that of its own storage, at most 2^-8 of itself, and a few of FP32; 1 + 2^-8 is for the second order.
    """
    p = problem(batch, padding=[0] if batch > 1 else [], **REAL)
    p.pool.states = p.pool.states.to(storage)
    exact, twin = p.double(), p._replace(pool=StatePool(p.pool.states.clone(), p.pool.arrivals.clone()))
    out, expected = decode_step(*p.step()), decode_step_plain(*exact.step())
    with plain_twins():
        plain = decode_step_plain(*twin.step())
    live = p.live
    assert off(out[live], expected[live]) < 2**-8
    assert off(out[live], expected[live]) < off(plain[live], expected[live])
    assert not out[~live].any()
    assert untouched(p)
    _, k, v = exact.layer.heads(exact.qkv[live], exact.cos[live], exact.sin[live])
    most = 2**-8 * k[:, 0].abs().amax(-1)[..., None, None] * v[:, 0, :, None, :].abs() + 8 * U * exact.states.abs().max()
    stored = 2**-8 * exact.states.abs() if storage == torch.bfloat16 else 0.0
    assert close(p.states, exact.states, (most + stored) * (1 + 2**-8))


@pytest.mark.parametrize(("room", "tokens"), [(2, 2), (4, 4), (8, 1), (8, 8)])
def test_bf16_rounds(room, tokens):
    """A few rounds with everything accepted: outputs within the BF16 limit above, states with the bits that stepping gives."""
    p = problem(9, tokens=16, padding=[4], **REAL)
    exact, start, live = p.double(), p.pool.states.clone(), p.live
    expected = torch.stack([decode_step_plain(*exact.step(t)) for t in range(16)], dim=1)
    stepped = torch.stack([decode_step(*p.step(t)) for t in range(16)], dim=1)
    states = p.states
    p.pool.states.copy_(start)
    pending, window = rings(p, room, tokens)
    out = []
    for first in range(0, 16, tokens):
        out.append(verify_step(*p.tokens(slice(first, first + tokens)).call(pending, window)))
        window.advance(p.slots, tokens)
    commit(p.layer, p.pool, p.slots, pending, window)
    assert torch.equal(p.states, states)
    for got in (stepped, torch.cat(out, dim=1)):
        # k's roundings of all tokens add up in quadrature with q's and the output's, and weigh no more than all k together
        assert off(got[live], expected[live]) < 2**-8
        assert not got[~live].any()


def test_the_same_bits_in_any_batch_and_every_time():
    """Programs of a group finish in any order: 64 rows, 100 times, and 3 of the rows alone."""
    p = problem(64, tokens=2, **REAL)
    start, first = p.pool.states.clone(), None
    for _ in range(100):
        p.pool.states.copy_(start)
        pending, window = rings(p, 2, 2)
        got = (decode_step(*p.step()), verify_step(*p.call(pending, window)), p.states)
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))
        assert not p.pool.arrivals.any()
    index = torch.tensor([63, 5, 17], device=DEVICE)
    part = p.rows(index)
    p.pool.states.copy_(start)
    assert torch.equal(decode_step(*part.step()), first[0][index])
    assert torch.equal(verify_step(*part.call(*rings(p, 2, 2))), first[1][index])


def test_a_graph_replays_what_eager_calls_do():
    """Slots, counts and inputs change between replays, in place."""
    p = problem(6, tokens=2, **REAL)
    pending, window = rings(p, 3, 2)
    accepted, start = torch.zeros(6, dtype=torch.int32, device=DEVICE), p.pool.states.clone()

    def round_() -> Tensor:
        out = torch.cat((decode_step(*p.step())[:, None], verify_step(*p.call(pending, window))), dim=1)
        window.advance(p.slots, accepted)
        return out

    def rounds(run) -> list[Tensor]:
        p.pool.states.copy_(start)
        window.count.zero_()
        window.start.zero_()
        out = []
        for r in range(6):
            p.slots.copy_(slots.roll(r).masked_fill(torch.arange(6, device=DEVICE) == r, -1))
            p.qkv.copy_(qkv.roll(r, 1).nan_to_num(0.0))
            accepted.fill_(r % 3)
            out.append(run().clone())
        return [*out, p.pool.states.clone()]

    slots, qkv = p.slots.clone(), p.qkv.clone()
    eager = rounds(round_)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = round_()
    replayed = rounds(lambda: (graph.replay(), captured)[1])
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(eager, replayed, strict=True))


def test_pools_beyond_two_to_the_31_values():
    p = problem(2, **REAL)
    big = torch.empty(2100, 64, 128, 128, device=DEVICE)
    slots = torch.tensor([2099, 2050], device=DEVICE)
    big[slots] = p.states
    out = decode_step(*p.step())
    large = p._replace(slots=slots, pool=StatePool(big, torch.zeros(2100, 64, dtype=torch.int32, device=DEVICE)))
    assert torch.equal(decode_step(*large.step()), out)
    assert torch.equal(large.states, p.states)
