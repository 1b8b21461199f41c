"""Decode steps over a pool of states: the plain forms against the model and the recurrence, the kernels against the plain forms.

Without a GPU the kernels run in Triton's interpreter. References are the plain forms in FP64 on the same numbers. In FP32
(u = 2^-24) an output of the recurrence is a sum of D products of things that took at most 40 roundings each, plus 2 per token
in the state: its error is at most (D + 40 + 2 per token) u times the same sum over absolute values. The norm divides by the
rms of the group; a rotation errs relative to its pair, not to each of the two: hence a group's largest sum, and twice that.
"""

from __future__ import annotations

import pytest
import torch
from decode_problem import DEVICE, GPU, Problem, U, close, limit, problem, rings, untouched
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from openling.model.cache import LayerCache
from openling.model.config import ModelConfig
from openling.model.ling import CallContext, LightningAttention, Rope
from openling.ops import fused
from openling.ops import kernels as fast
from openling.ops.lightning import lightning_recurrent, log_decay
from openling.ops.lightning_decode import (
    DecodeLayer,
    PendingWindow,
    StatePool,
    commit,
    commit_plain,
    decode_step,
    decode_step_plain,
    verify_step,
    verify_step_plain,
)

# (room, tokens of a call): verification with the commit in the next round, deferral, both.
WINDOWS = [(2, 2), (4, 4), (3, 1), (5, 2)]
PLAIN = (decode_step_plain, verify_step_plain, commit_plain)
ENTRIES = (decode_step, verify_step, commit)


@pytest.fixture
def kernels(monkeypatch):
    """The entries run the kernels, whatever the device and the dtype."""
    monkeypatch.setattr(fused, "kernels_for", lambda x: fast)


# ---------------------------------------------------------------------------------------------------------------------
# One token
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"use_qk_norm": False}, {"linear_silu": True}, {"partial_rotary_factor": 1.0}])
def test_plain_step_is_what_the_model_does(change):
    """Projections and `decode_step_plain` are `LightningAttention.mix` with a cache: FP64, both round about 100 times."""
    shape = {"vocab_size": 9, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = {"num_key_value_heads": 4, "head_dim": 8, "layer_kinds": ("lightning", "lightning"), "group_norm_size": 2}
    config = ModelConfig(**shape | kinds | {"use_qk_norm": True, "partial_rotary_factor": 0.5} | change)
    torch.manual_seed(0)
    mixer = LightningAttention(config, 1).double()
    for name, x in mixer.named_parameters():
        torch.nn.init.normal_(x, 1.0 if "norm" in name else 0.0, 0.4)
    gains = (mixer.query_layernorm.weight, mixer.key_layernorm.weight) if config.use_qk_norm else (None, None)
    layer = DecodeLayer(log_decay(*mixer.decay_of), *gains, mixer.g_norm.weight, config.rms_norm_eps, 2, config.linear_silu)
    pool, cache, slots = StatePool.new(5, 4, 8, dtype=torch.float64), LayerCache(), torch.tensor([3, 0])
    for t in range(4):
        x = torch.randn(2, 1, 24, dtype=torch.float64)
        tables = Rope(config)(torch.zeros(2, 1, dtype=torch.long), t, None)
        expected = mixer.mix(x, CallContext(tables, None, None), cache)[:, 0]
        cos, sin = (table[:, 0, 0].expand(2, -1) for table in tables.head)
        out = decode_step_plain(mixer.query_key_value(x)[:, 0], mixer.g_proj(x)[:, 0], layer, pool, slots, cos, sin)
        assert close(out, expected, 1e-12)
        assert close(pool.states[slots], cache.state, 1e-12)


SHAPES = {
    "batch": st.integers(1, 3),
    "heads_groups": st.sampled_from([(2, 1), (3, 3), (4, 2), (6, 2)]),
    "dim_pairs": st.sampled_from([(16, 0), (16, 8), (32, 4), (64, 16)]),
    "norm": st.booleans(),
    "silu": st.booleans(),
    "seed": st.integers(0, 99),
}
SEARCH = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=6, **SEARCH)
@given(**SHAPES)
def test_kernel_steps_are_the_plain_steps(kernels, batch, heads_groups, dim_pairs, norm, silu, seed):
    """Two tokens in a row, one row of padding, of a pool of which most is poison."""
    (heads, groups), (dim, pairs) = heads_groups, dim_pairs
    shape = {"pairs": pairs, "groups": groups, "norm": norm, "silu": silu, "padding": [0]}
    p = problem(batch + 1, heads, dim, tokens=2, seed=seed, **shape)
    p = p._replace(slots=p.slots.to(torch.int32) if seed % 2 else p.slots)
    exact = p.double()
    for t in range(2):
        most = limit(exact.tokens(slice(t, t + 1)), seen=t)[:, 0]
        out, expected = decode_step(*p.step(t)), decode_step_plain(*exact.step(t))
        assert close(out[p.live], expected[p.live], most)
        assert not out[~p.live].any()
        assert not expected[~p.live].any()
        assert untouched(p)
    largest = 3 * exact.states.abs().amax() + 20  # two steps of four roundings of terms below that
    assert close(p.states, exact.states, 8 * U * largest)


def test_kernel_steps_are_the_recurrence(kernels):
    """Eight tokens at D = 128: outputs and last states of `lightning_recurrent`, strong and weak decays alike."""
    p = problem(1, 2, 128, tokens=8, pairs=32, groups=1)
    exact, layer = p.double(), p.double().layer
    o, states = lightning_recurrent(*layer.heads(exact.qkv, p.cos, p.sin), layer.log_decay, initial_state=exact.states)
    expected, most = layer.gated(o, exact.gate), limit(exact, seen=8)
    out = torch.stack([decode_step(*p.step(t)) for t in range(8)], dim=1)
    assert close(out, expected, most)
    assert close(p.states, states, 2 * (8 + 10) * U * states.abs().max())


def test_slow_heads_do_not_drift(kernels):
    """Nothing but decay: n steps must leave exp(n g) of a state. Here exp(g) rounded to FP32 would be 3e-8 off in every step.

    Each step of ours rounds by at most 2^-24 in all and to either side: sqrt(n) of that for an entry, less for the mean.
    """
    steps = 4000 if GPU else 40
    p = problem(1, 1, 16, groups=1, norm=False)
    p.layer.log_decay.fill_(-1.0103e-5)
    p.qkv.zero_()
    before, decay = p.states.double(), p.layer.log_decay.double()
    for _ in range(steps):
        decode_step(*p.step())
    error = ((p.states.double() / before).mean() - torch.exp(steps * decay)).abs()
    assert error < U * steps**0.5
    assert steps * (torch.exp(decay).float().double() - torch.exp(decay)).abs() > 3 * error


# ---------------------------------------------------------------------------------------------------------------------
# Several tokens, deferred writes
# ---------------------------------------------------------------------------------------------------------------------


def speculate(p: Problem, room: int, tokens: int, forms, *, seen_matters: bool) -> None:
    """Rounds of speculative decoding against FP64 steps through what was accepted: all outputs, and the states after a commit.

    Row b accepts (b + round) % (tokens + 1) of its tokens, so that every count comes up, also in rows whose ring is full.
    """
    _, verify, fold = forms
    exact, live = p.double(), p.live
    pending, window = rings(p, room, tokens)
    row = torch.arange(p.slots.shape[0], device=DEVICE)
    for r in range(p.qkv.shape[1] // tokens):
        new = slice(r * tokens, (r + 1) * tokens)
        draft, accepted = exact.tokens(new), (row + r) % (tokens + 1)
        most = limit(draft, seen=(r + 1) * tokens) if seen_matters else 1e-11
        out, states, expected = verify(*p.tokens(new).call(pending, window)), [draft.states], []
        for t in range(tokens):
            expected.append(decode_step_plain(*draft.step(t))[live])
            states.append(draft.states)
        assert close(out[live], torch.stack(expected, dim=1), most)
        assert not out[~live].any()
        assert untouched(p)
        window.advance(p.slots, accepted)
        kept = torch.stack(states)[accepted[live], torch.arange(int(live.sum()), device=DEVICE)]
        exact.pool.states[p.slots[live]] = kept
    fold(p.layer, p.pool, p.slots, pending, window)
    window.clear(p.slots)
    assert not window.count[p.slots].any()
    assert untouched(p)
    assert close(p.states, exact.states, (2 * p.qkv.shape[1] + 10) * U * exact.states.abs().max() if seen_matters else 1e-11)


@pytest.mark.parametrize(("room", "tokens"), WINDOWS)
def test_plain_rounds_are_steps(room, tokens):
    p = problem(6, 4, 8, tokens=6 * tokens, pairs=2, padding=[2], dtype=torch.float64)
    speculate(p, room, tokens, PLAIN, seen_matters=False)


@pytest.mark.parametrize(("room", "tokens"), WINDOWS)
def test_kernel_rounds_are_steps(kernels, room, tokens):
    dim = 64 if tokens == 4 else 16  # 64: two programs share the keys of a head
    p = problem(tokens + 2, 2, dim, tokens=(4 if dim == 16 else 3) * tokens, padding=[1], seed=room)
    speculate(p, room, tokens, ENTRIES, seen_matters=True)


@settings(max_examples=4, **SEARCH)
@given(**SHAPES)
def test_kernel_rounds_at_any_shape(kernels, batch, heads_groups, dim_pairs, norm, silu, seed):
    (heads, groups), (dim, pairs) = heads_groups, dim_pairs
    p = problem(batch, heads, dim, tokens=6, pairs=pairs, groups=groups, norm=norm, silu=silu, seed=seed)
    speculate(p, 2 + seed % 3, 2, ENTRIES, seen_matters=True)


@pytest.mark.parametrize(("room", "tokens"), [(2, 2), (3, 1), (4, 1), (7, 3)])
def test_states_have_the_same_bits_whichever_way_tokens_came(kernels, room, tokens):
    """Stepping, verifying with everything accepted, and deferring round alike."""
    p = problem(3, 2, 16, tokens=6)
    start = p.pool.states.clone()
    for t in range(6):
        decode_step(*p.step(t))
    stepped = p.states
    p.pool.states.copy_(start)
    pending, window = rings(p, room, tokens)
    for first in range(0, 6, tokens):
        verify_step(*p.tokens(slice(first, first + tokens)).call(pending, window))
        window.advance(p.slots, tokens)
    commit(p.layer, p.pool, p.slots, pending, window)
    assert torch.equal(p.states, stepped)


def test_calls_may_bring_fewer_tokens_than_the_window_was_made_for(kernels):
    p = problem(2, 2, 16, tokens=4)
    pending, window = rings(p, 4, 3)
    exact = p.double()
    for new in (slice(0, 3), slice(3, 4)):
        most, part = limit(exact.tokens(new), seen=4), exact.tokens(new)
        expected = torch.stack([decode_step_plain(*part.step(t)) for t in range(part.qkv.shape[1])], dim=1)
        assert close(verify_step(*p.tokens(new).call(pending, window)), expected, most)
        window.advance(p.slots, new.stop - new.start)
    with pytest.raises(ValueError, match="1 to 3 tokens, as the window was made for, not 4"):
        verify_step(*p.call(pending, window))


def test_rings_of_other_slots_are_left_alone(kernels):
    p = problem(4, 2, 16, tokens=2, padding=[3])
    pending, window = rings(p, 2, 2)
    used = p.slots[p.live]
    for _ in range(2):
        verify_step(*p.call(pending, window))
        window.advance(p.slots, 2)
    for ring in (pending.keys, pending.values):
        written = ring.isfinite().flatten(3).all(-1)  # [S, H, C]
        assert written[used].all()  # room 2 and 2 new: two rounds fill all four rows
        assert written.sum() == written[used].sum()


def test_window_counts():
    """Room for 3, calls of 2: the second call finds no room for its two behind the 2 that wait, so these are folded."""
    window = PendingWindow.new(4, room=3, tokens=2)
    slots = torch.tensor([2, -1, 0])
    for accepted, starts, counts in (([2, 1, 1], [0, 0], [2, 1]), ([1, 2, 2], [2, 0], [1, 3]), ([0, 0, 2], [2, 3], [1, 2])):
        window.advance(slots, torch.tensor(accepted))
        assert window.start[[2, 0]].tolist() == starts
        assert window.count[[2, 0]].tolist() == counts
    assert window.count[[1, 3]].tolist() == [0, 0]
    window.clear(slots)
    assert not window.count.any()
    with pytest.raises(ValueError, match="a call's 3 tokens must be at least 1 and fit into the room for 2"):
        PendingWindow.new(4, room=2, tokens=3)


# ---------------------------------------------------------------------------------------------------------------------
# Batches and shapes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_row_has_the_same_bits_in_any_batch(kernels):
    p = problem(5, 2, 32, tokens=2, padding=[4])
    start = p.pool.states.clone()

    def run(index: list[int]) -> tuple[Tensor, Tensor]:
        p.pool.states.copy_(start)
        part = p.rows(torch.tensor(index, device=DEVICE))
        pending, window = rings(p, 2, 2)
        out = torch.cat((decode_step(*part.step())[:, None], verify_step(*part.call(pending, window))), dim=1)
        return out, p.pool.states[p.slots[0]].clone()

    whole, state = run([0, 1, 2, 3, 4])
    for index in ([0], [3, 0], [4, 2, 0, 1]):
        out, again = run(index)
        assert torch.equal(out, whole[index])
        assert torch.equal(again, state)


@pytest.mark.parametrize(("heads", "dim", "groups"), [(2, 24, 2), (2, 8, 1), (3, 16, 2)])
def test_shapes_without_a_kernel_run_the_plain_form(kernels, heads, dim, groups):
    """Head dims that are no power of two from 16 up, groups that cut through a head."""
    p = problem(2, heads, dim, groups=groups)
    exact = p.double()
    most = limit(exact)[:, 0]
    assert close(decode_step(*p.step()), decode_step_plain(*exact.step()), most)
    pending, window = rings(p, 1, 1)
    most = limit(exact, seen=1)
    assert close(verify_step(*p.call(pending, window))[:, 0], decode_step_plain(*exact.step()), most[:, 0])
    window.advance(p.slots, 1)
    commit(p.layer, p.pool, p.slots, pending, window)
    assert close(p.states, exact.states, 20 * U * exact.states.abs().max())


def test_a_batch_of_padding_and_an_empty_one(kernels):
    p = problem(2, 2, 16, padding=[0, 1])
    pending, window = rings(p, 1, 1)
    empty = p.rows(torch.arange(0, device=DEVICE))
    for part in (p, empty):
        assert not decode_step(*part.step()).any()
        assert not verify_step(*part.call(pending, window)).any()
        commit(part.layer, part.pool, part.slots, pending, window)
    assert p.pool.states.isnan().all()
