"""Lightning attention against its T x T formula, its recurrence, the published decays and another implementation.

Tolerances: errors are relative to the largest output. FP64 sums of at most 200 terms round to about 1e-14, so 1e-12 leaves room
for long states; FP32 has 1e-7 per operation and about sqrt(200) of them, well under the required 1e-5.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from openling.ops.lightning import CHUNK, decay_slopes, lightning, lightning_chunk, lightning_recurrent, log_decay

FP64, FP32 = 1e-12, 1e-5


def inputs(batch, tokens, heads, dim, value_dim=None, *, seed=0, dtype=torch.float64):
    """q, k, v, and log-decays between the strongest and the weakest of Ling-2.6."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, tokens, heads, dim, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value_dim or dim, generator=g, dtype=torch.float64)
    decay = -torch.logspace(0, -4, heads, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, decay)]


def first_state(documents, heads, dim, value_dim=None, *, seed=9):
    return torch.randn(
        documents, heads, dim, value_dim or dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def formula(q, k, v, log_decay_H, state=None, scale=None):
    """o = scale (D * (q k^T)) v + scale lam^(t+1) q S_0 with the T x T decay matrix D written out, FP64; final state too."""
    q, k, v, g = (x.double() for x in (q, k, v, log_decay_H))
    tokens, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    t = torch.arange(tokens, dtype=torch.float64)
    age = t[:, None] - t[None, :]
    decay_HTT = torch.where(age >= 0, torch.exp(g[:, None, None] * age.clamp(min=0)), 0.0)
    out = torch.einsum("bthd,bshd,hts,bshe->bthe", q, k, decay_HTT, v)
    last = torch.einsum("hs,bshd,bshe->bhde", torch.exp(g[:, None] * (tokens - 1 - t)), k, v)
    if state is not None:
        state = state.double()
        out = out + torch.einsum("ht,bthd,bhde->bthe", torch.exp(g[:, None] * (t + 1)), q, state)
        last = last + torch.exp(g * tokens)[:, None, None] * state
    return scale * out, last


def error(found, expected):
    """Largest difference over the largest expected value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-300))


def documents_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def test_recurrence_equals_the_formula():
    q, k, v, g = inputs(2, 50, 3, 4, 6)
    state = first_state(2, 3, 4, 6)
    out, last = lightning_recurrent(q, k, v, g, initial_state=state)
    expected, expected_last = formula(q, k, v, g, state)
    assert error(out, expected) < FP64
    assert error(last, expected_last) < FP64


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 200),
    chunk=st.integers(1, 90),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    begun=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 999),
)
def test_chunk_equals_the_formula_at_any_length(tokens, chunk, batch, heads, dim, value_dim, begun, dtype, seed):
    q, k, v, g = inputs(batch, tokens, heads, dim, value_dim, seed=seed, dtype=dtype)
    state = first_state(batch, heads, dim, value_dim) if begun else None
    out, last = lightning_chunk(q, k, v, g, initial_state=state, chunk=chunk)
    expected, expected_last = formula(q, k, v, g, state)
    # The largest value may itself be a sum that cancelled: rounding is relative to the sum of the terms' sizes.
    size, last_size = formula(q.abs(), k.abs(), v.abs(), g, None if state is None else state.abs())
    tolerance = FP64 if dtype == torch.float64 else FP32
    assert out.dtype == last.dtype == dtype
    assert (out - expected).abs().max() < tolerance * size.max()
    assert (last - expected_last).abs().max() < tolerance * last_size.max()


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 129, 200])
def test_chunk_equals_recurrence_in_fp32(tokens):
    q, k, v, g = inputs(2, tokens, 4, 16, dtype=torch.float32)
    state = first_state(2, 4, 16).float()
    for found, expected in zip(
        lightning_chunk(q, k, v, g, initial_state=state), lightning_recurrent(q, k, v, g, initial_state=state), strict=True
    ):
        assert error(found, expected) < FP32


def test_chunk_equals_recurrence_in_fp64_to_rounding():
    q, k, v, g = inputs(1, 200, 4, 16)
    for found, expected in zip(lightning_chunk(q, k, v, g), lightning_recurrent(q, k, v, g), strict=True):
        assert error(found, expected) < 4e-15 * 4  # 4e-15 was measured in numpy; four times for another summation order


@pytest.mark.parametrize("slope", [0.0, 1e-6, 5.0, 50.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_decay_and_any_strong_decay_stay_finite_and_right(slope, dtype):
    q, k, v, _ = inputs(1, 3 * CHUNK + 7, 2, 8, dtype=dtype)
    g = torch.full((2,), -slope, dtype=dtype)
    state = first_state(1, 2, 8).to(dtype)
    out, last = lightning_chunk(q, k, v, g, initial_state=state)
    expected, expected_last = formula(q, k, v, g, state)
    tolerance = FP64 if dtype == torch.float64 else FP32
    assert error(out, expected) < tolerance
    assert error(last, expected_last) < tolerance
    assert torch.isfinite(out).all()
    assert torch.isfinite(last).all()


def test_half_precision_inputs_keep_an_fp32_state():
    q, k, v, g = inputs(1, 100, 2, 8, dtype=torch.float32)
    half = [x.bfloat16() for x in (q, k, v)]
    out, last = lightning_chunk(*half, g)
    expected, expected_last = formula(*half, g)
    assert (out.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert error(last, expected_last) < FP32
    assert error(out, expected) < 2**-8  # one rounding to BF16


def test_autocast_does_not_reach_the_kernel():
    q, k, v, g = inputs(1, 70, 2, 8, dtype=torch.float32)
    plain, plain_state = lightning_chunk(q, k, v, g)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_state = lightning_chunk(q, k, v, g)
        step, _ = lightning(q[:, :1], k[:, :1], v[:, :1], g)
    assert torch.equal(plain, cast)
    assert torch.equal(plain_state, cast_state)
    assert error(step, plain[:, :1]) < FP32


def test_scale_is_applied_once_and_can_be_given():
    q, k, v, g = inputs(1, 30, 2, 128)
    default, state = lightning_chunk(q, k, v, g)
    unscaled, same_state = lightning_chunk(q, k, v, g, scale=1.0)
    assert error(default, unscaled * 0.0883883476483184) < FP64  # 128^(-1/2)
    assert error(state, same_state) < FP64
    assert error(lightning_recurrent(q, k, v, g, scale=0.5)[0], 0.5 * unscaled) < FP64


def test_equals_minimax_of_transformers():
    """Same recurrence, another block form, no query scaling, interleaved q/k/v rows, SiLU on them: all taken over here."""
    torch.manual_seed(0)
    c = MiniMaxConfig(
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        num_hidden_layers=6,
        block_size=16,
        layer_types=["linear_attention"] * 6,
    )
    other = MiniMaxLightningAttention(c, layer_idx=2).double()
    other.norm, other.out_proj = torch.nn.Identity(), torch.nn.Identity()
    with torch.no_grad():
        other.output_gate.weight.zero_()  # a gate of 1/2
        x = torch.randn(2, 53, 32, dtype=torch.float64)
        expected, expected_state = other(x, None, None)
        q, k, v = torch.nn.functional.silu(other.qkv_proj(x)).unflatten(-1, (4, 3, 8)).unbind(3)
        slopes = other.slope_rate.flatten()
        out, state = lightning_chunk(q, k, v, -slopes, scale=1.0)
    # They divide by L - 1 + 1e-5, we by L - 1: 2e-6 in the factor; their buffers are FP32.
    assert torch.allclose(log_decay(4, 2, 6).double(), -slopes, rtol=1e-5)
    assert error(0.5 * out.flatten(2), expected) < 1e-6
    assert error(state, expected_state) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# States and documents
# ---------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data(), tokens=st.integers(2, 150), pieces=st.integers(1, 5), begun=st.booleans())
def test_a_sequence_cut_anywhere_with_the_state_carried_on(data, tokens, pieces, begun):
    q, k, v, g = inputs(2, tokens, 2, 5, 3)
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), min_size=pieces, max_size=pieces)))
    state = first_state(2, 2, 5, 3) if begun else None
    expected, expected_last = formula(q, k, v, g, state)
    parts = []
    for a, b in zip([0, *cuts], [*cuts, tokens], strict=True):
        if a < b:
            out, state = lightning(q[:, a:b], k[:, a:b], v[:, a:b], g, initial_state=state)
            parts.append(out)
    assert error(torch.cat(parts, dim=1), expected) < FP64
    assert error(state, expected_last) < FP64


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6), chunk=st.integers(1, 70), begun=st.booleans())
def test_packed_documents_equal_separate_ones(lengths, chunk, begun):
    """Documents of length 0 included: they keep their state."""
    total, n = sum(lengths), len(lengths)
    q, k, v, g = inputs(1, total, 2, 4)
    state = first_state(n, 2, 4) if begun else None
    bounds = documents_of(lengths)
    for op, options in ((lightning_chunk, {"chunk": chunk}), (lightning_recurrent, {})):
        out, last = op(q, k, v, g, initial_state=state, cu_seqlens=bounds, **options)
        assert out.shape == v.shape
        for i, (a, b) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            before = state[i : i + 1] if begun else None
            expected, expected_last = formula(q[:, a:b], k[:, a:b], v[:, a:b], g, before)
            assert a == b or error(out[:, a:b], expected) < FP64
            assert torch.allclose(last[i : i + 1], expected_last, rtol=0, atol=1e-11)


def test_one_packed_token_is_not_mistaken_for_a_decoding_step():
    q, k, v, g = inputs(1, 1, 2, 4)
    out, states = lightning(q, k, v, g, cu_seqlens=torch.tensor([0, 0, 1, 1]))
    assert states.shape[0] == 3
    assert error(out, formula(q, k, v, g)[0]) < FP64
    assert not states[0].any()
    assert not states[2].any()


@pytest.mark.parametrize("bounds", [[0, 5], [1, 10], [0, 7, 4, 10], [0, 11]])
@pytest.mark.parametrize("op", [lightning_chunk, lightning_recurrent])
def test_bad_document_bounds_are_refused(op, bounds):
    q, k, v, g = inputs(1, 10, 2, 4)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 10"):
        op(q, k, v, g, cu_seqlens=torch.tensor(bounds))


def test_packing_needs_a_single_row_and_states_of_the_right_shape():
    q, k, v, g = inputs(2, 10, 2, 4)
    with pytest.raises(ValueError, match="batch 2"):
        lightning_chunk(q, k, v, g, cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match=r"initial state must be \[2, 2, 4, 4\]"):
        lightning_chunk(q, k, v, g, initial_state=torch.zeros(1, 2, 4, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, devices
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "lengths"), [(1, None), (37, None), (80, None), (80, [13, 0, 33, 34])])
def test_gradients_equal_those_of_the_recurrence(tokens, lengths):
    """Of q, k, v and the initial state, through the output and the final state."""
    documents = 2 if lengths is None else len(lengths)
    batch = 2 if lengths is None else 1
    q, k, v, g = inputs(batch, tokens, 2, 4, 3)
    leaves = [q, k, v, first_state(documents, 2, 4, 3)]
    bounds = None if lengths is None else documents_of(lengths)
    found = []
    for op in (lambda *a, **kw: lightning_chunk(*a, chunk=16, **kw), lightning_recurrent):
        own = [x.clone().requires_grad_() for x in leaves]
        out, last = op(*own[:3], g, initial_state=own[3], cu_seqlens=bounds)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
        loss = (weights * out).sum() + last.pow(2).sum()
        found.append(torch.autograd.grad(loss, own))
    for chunk, recurrent in zip(*found, strict=True):
        assert error(chunk, recurrent) < FP64


def test_strong_decays_have_finite_gradients():
    q, k, v, _ = inputs(1, 2 * CHUNK, 2, 4, dtype=torch.float32)
    own = [x.requires_grad_() for x in (q, k, v)]
    out, _ = lightning_chunk(*own, torch.tensor([-50.0, -5.0]))
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(out.sum(), own))


def test_inner_tensors_follow_the_inputs_device():
    """Whatever is made without a device lands on `meta` here, and meeting CPU tensors it fails."""
    q, k, v, g = inputs(1, 70, 2, 4)
    bounds = torch.tensor([0, 30, 70])
    with torch.device("meta"):
        lightning_chunk(q, k, v, g, cu_seqlens=bounds)
        lightning_recurrent(q, k, v, g, cu_seqlens=bounds)
        lightning(q[:, :1], k[:, :1], v[:, :1], g)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", [lightning_chunk, lightning_recurrent, lightning])
def test_cuda_equals_cpu_with_decays_left_on_the_cpu(op):
    q, k, v, g = inputs(1, 150, 3, 16)
    bounds = torch.tensor([0, 70, 70, 150])
    expected, expected_state = op(q, k, v, g, cu_seqlens=bounds)
    out, state = op(q.cuda(), k.cuda(), v.cuda(), g, cu_seqlens=bounds.cuda())
    assert error(out.cpu(), expected) < FP64
    assert error(state.cpu(), expected_state) < FP64


# ---------------------------------------------------------------------------------------------------------------------
# Decays: architecture.md 3.2 and 8
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "first"), [(16, 0.70711), (32, 0.84090), (64, 0.91700)])
def test_base_slopes(heads, first):
    slopes = decay_slopes(heads)
    assert round(slopes[0], 5) == first
    assert slopes[-1] == 2**-8


def test_slopes_of_head_counts_that_are_no_power_of_two():
    """slopes(8), then every second of slopes(16): SmolLM2's nine heads end in 2^(-1/2)."""
    assert decay_slopes(9) == [*decay_slopes(8), 2**-0.5]
    assert decay_slopes(12) == decay_slopes(8) + decay_slopes(16)[0:8:2]
    assert all(len(decay_slopes(n)) == n for n in range(1, 70))


@pytest.mark.parametrize(
    ("layers", "layer", "offset", "factor"),
    [(32, 0, 0, 1.00001), (32, 30, 0, 0.03227), (32, 30, 1, 0.06453), (80, 78, 0, 0.01267), (80, 78, 1, 0.02533)]
    + [(32, 0, 1, 1.03227), (80, 0, 1, 1.01267), (1, 0, 0, 1.00001)],
)
def test_layer_factors(layers, layer, offset, factor):
    decay = log_decay(64, layer, layers, offset)
    slopes = torch.tensor(decay_slopes(64))
    assert torch.allclose(-decay / slopes, torch.full((64,), factor), atol=6e-6)


# Shortest, median and longest half-life in tokens of (layers, heads, offset) at layers 0, L / 2, L - 2.
HALF_LIVES = {
    (80, 64, 0): ((0.76, 11.6, 177), (1.53, 23.5, 359), (59.7, 915, 14007)),
    (80, 64, 1): ((0.75, 11.4, 175), (1.49, 22.9, 350), (29.9, 458, 7006)),
    (32, 32, 0): ((0.82, 12.1, 177), (1.70, 25.1, 367), (25.6, 376, 5499)),
    (32, 32, 1): ((0.80, 11.8, 172), (1.60, 23.5, 344), (12.8, 188, 2750)),
}


@pytest.mark.parametrize("shape", HALF_LIVES)
def test_half_lives(shape):
    layers, heads, offset = shape
    for layer, published in zip((0, layers // 2, layers - 2), HALF_LIVES[shape], strict=True):
        lives = math.log(2) / -log_decay(heads, layer, layers, offset).double()
        for found, expected in zip((lives.min(), lives.quantile(0.5), lives.max()), published, strict=True):
            # Half a unit of the last printed digit, and 0.05 % for FP32 factors near zero.
            digit = 0.5 if expected > 100 else 0.05 if expected >= 10 else 0.005
            assert abs(float(found) - expected) <= digit + 5e-4 * expected, (layer, expected, float(found))
