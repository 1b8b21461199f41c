"""QK-norm removal: what each method minimises, where it is exact, and what is reported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openling.config.migrate import Conversion
from openling.migrate.convert import without_qk_norm
from openling.migrate.qknorm import REMOVALS, NormedHeads, remove_norms
from openling.model.config import ModelConfig
from openling.model.ling import GroupedQueryAttention

EPS = 1e-6


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(seed=0, heads=3, dim=6, width=10, scale=1.0, gamma=True):
    """Heads, gamma and three batches of inputs whose rms differs widely from token to token."""
    weight = scale * randn(heads, dim, width, seed=seed)
    weights = 1 + 0.8 * randn(dim, seed=seed + 1) if gamma else torch.ones(dim).double()
    inputs = [randn(50, width, seed=seed + s) * (0.7 * randn(50, 1, seed=seed + s + 10)).exp() for s in (2, 3, 4)]
    return weight, weights, EPS, inputs


def exact_heads(weight, gamma, eps, x):
    """gamma * k / sqrt(mean k^2 + eps), head by head."""
    out = []
    for w in weight:
        k = x @ w.T
        out.append(gamma * k / (k.square().mean(-1, keepdim=True) + eps).sqrt())
    return torch.stack(out, dim=1)


def heads_of(weight, gamma, eps, inputs):
    heads = NormedHeads(weight, gamma, eps)
    for x in inputs:
        heads.add(x)
    return heads


def remove_norm(weight, gamma, eps, inputs, method, **more):
    return heads_of(weight, gamma, eps, inputs).replacement(method, **more)


def best_removal(weight, gamma, eps, inputs):
    (found,) = remove_norms(weight, gamma.expand(weight.shape[:2]), eps, inputs, "best", [len(weight)])
    return found.method


def removal_error(weight, gamma, eps, inputs, replacement):
    """Relative squared error, from the definition."""
    x = torch.cat(inputs)
    exact = exact_heads(weight, gamma, eps, x)
    return float((torch.einsum("hdm,nm->nhd", replacement, x) - exact).square().sum() / exact.square().sum())


def test_normed_heads_equal_the_mixers_norm():
    weight, gamma, eps, inputs = case()
    found, rms = NormedHeads(weight, gamma, eps).of(inputs[0])
    assert torch.allclose(found, exact_heads(weight, gamma, eps, inputs[0]), rtol=1e-12)
    assert torch.allclose(found * rms[..., None], gamma * torch.einsum("hdm,nm->nhd", weight, inputs[0]))


def test_pooled_equals_equation_1_of_the_report():
    """diag(gamma) W / sqrt(1 / (N d) sum_ij k_ij^2 + eps), the sum over all tokens and the dims of a head."""
    weight, gamma, eps, inputs = case()
    x = torch.cat(inputs)
    found = remove_norm(weight, gamma, eps, inputs, "pooled")
    for h, w in enumerate(weight):
        k = x @ w.T
        expected = gamma[:, None] * w / (k.square().sum() / k.numel() + eps).sqrt()
        assert torch.allclose(found[h], expected, rtol=1e-12)


def test_scalar_is_e_r_over_e_r_squared_for_unit_gamma():
    weight, gamma, _, inputs = case(gamma=False)
    x = torch.cat(inputs)
    found = remove_norm(weight, gamma, 0.0, inputs, "scalar")
    for h, w in enumerate(weight):
        r = (x @ w.T).square().mean(-1).sqrt()
        assert torch.allclose(found[h], w * r.mean() / r.square().mean(), rtol=1e-12)
        pooled = r.square().mean().rsqrt()
        assert r.mean() / r.square().mean() <= pooled  # Cauchy-Schwarz


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), scale=st.sampled_from((0.01, 1.0, 50.0)), gamma=st.booleans())
def test_scalar_is_the_best_single_factor_of_each_head(seed, scale, gamma):
    weight, g, eps, inputs = case(seed, scale=scale, gamma=gamma)
    found = remove_norm(weight, g, eps, inputs, "scalar")
    plain = g[:, None] * weight
    x = torch.cat(inputs)
    target = exact_heads(weight, g, eps, x)
    for h in range(len(weight)):
        y = x @ plain[h].T
        best = (target[:, h] * y).sum() / (y * y).sum()  # projection on the one direction
        assert torch.allclose(found[h], best * plain[h], rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), scale=st.sampled_from((0.01, 1.0, 50.0)), gamma=st.booleans())
def test_errors_on_the_fitted_data_are_ordered(seed, scale, gamma):
    """ridge <= scalar <= pooled: a map over a factor, the best factor over another. Whatever the size of the keys."""
    arguments = case(seed, scale=scale, gamma=gamma)
    error = {m: removal_error(*arguments, remove_norm(*arguments, m)) for m in REMOVALS}
    assert error["ridge"] <= error["scalar"] * (1 + 1e-9)
    assert error["scalar"] <= error["pooled"] * (1 + 1e-9)
    assert 0 < error["ridge"] < 1


def test_ridge_tends_to_least_squares():
    weight, gamma, eps, inputs = case()
    found = remove_norm(weight, gamma, eps, inputs, "ridge", damping=1e-13)
    x = torch.cat(inputs)
    expected = torch.linalg.lstsq(x, exact_heads(weight, gamma, eps, x).flatten(1)).solution.T.view_as(weight)
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_ridge_with_much_damping_is_scalar():
    arguments = case()
    assert torch.allclose(remove_norm(*arguments, "ridge", damping=1e12), remove_norm(*arguments, "scalar"), rtol=1e-6)


@pytest.mark.parametrize("method", REMOVALS)
def test_gamma_folding_is_exact_when_all_rms_are_equal(method):
    """Heads that are rotations of one another and inputs scaled to one rms: the norm is a constant, and gone exactly."""
    _, gamma, eps, inputs = case()
    base = randn(6, 10, seed=8)
    weight = torch.stack([torch.linalg.qr(randn(6, 6, seed=s)).Q @ base for s in range(3)])
    inputs = [2.5 * x / (x @ base.T).square().mean(-1, keepdim=True).sqrt() for x in inputs]
    found = remove_norm(weight, gamma, eps, inputs, method)
    assert removal_error(weight, gamma, eps, inputs, found) < 1e-20
    assert torch.allclose(found, gamma[:, None] * weight / (2.5**2 + eps) ** 0.5, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", REMOVALS)
def test_errors_from_sums_are_those_of_the_inputs(method):
    """Head by head, also where heads differ in gamma. They are differences of sums as large as the energy."""
    weight, _, eps, inputs = case()
    gamma = 1 + 0.8 * randn(3, 6, seed=7)
    heads = heads_of(weight, gamma, eps, inputs)
    replacement = heads.replacement(method)
    wrong, energy = heads.errors(replacement)
    for h in range(3):
        x = torch.cat(inputs)
        exact = exact_heads(weight[h : h + 1], gamma[h], eps, x)[:, 0]
        assert float(energy[h]) == pytest.approx(float(exact.square().sum()), rel=1e-12)
        expected = float((x @ replacement[h].T - exact).square().sum())
        assert float(wrong[h]) == pytest.approx(expected, abs=1e-13 * float(energy[h]))
    beside = sum(heads.errors_on(x, replacement) for x in inputs)
    assert torch.allclose(beside, wrong, rtol=0, atol=1e-13 * float(energy.max()))
    assert torch.allclose(heads.errors(torch.zeros_like(weight))[0], energy)


def test_heads_side_by_side_are_as_by_themselves():
    """One pass for queries and keys: each group has its own method and error."""
    weight, _, eps, inputs = case(heads=5)
    gamma = torch.cat((torch.ones(3, 6), 1 + 0.8 * randn(1, 6, seed=7).expand(2, 6))).double()
    found = remove_norms(weight, gamma, eps, inputs, "best", [3, 2])
    for part, one in zip((slice(3), slice(3, 5)), found, strict=True):
        (alone,) = remove_norms(weight[part], gamma[part], eps, inputs, "best", [len(weight[part])])
        assert (one.method, one.weight.shape) == (alone.method, alone.weight.shape)
        assert torch.allclose(one.weight, alone.weight, rtol=1e-9, atol=1e-12)
        assert one.error == pytest.approx(removal_error(weight[part], gamma[part][0], eps, inputs, one.weight), rel=1e-9)
        assert one.error == pytest.approx(alone.error, rel=1e-9)


def test_one_batch_serves_for_both():
    weight, gamma, eps, inputs = case()
    assert best_removal(weight, gamma, eps, inputs[:1]) == "ridge"  # never worse where it was fitted


def test_best_is_chosen_on_held_out_inputs():
    """Few tokens and wide inputs: ridge fits the noise of the training batches, and the held-out batch shows it."""
    weight, gamma, eps, _ = case(width=40)
    few = [randn(15, 40, seed=s) for s in (1, 2, 3)]
    fit = few[:-1]
    errors = {m: removal_error(weight, gamma, eps, few[-1:], remove_norm(weight, gamma, eps, fit, m)) for m in REMOVALS}
    assert best_removal(weight, gamma, eps, few) == min(errors, key=errors.get) != "ridge"
    on_fit = {m: removal_error(weight, gamma, eps, fit, remove_norm(weight, gamma, eps, fit, m)) for m in REMOVALS}
    assert min(on_fit, key=on_fit.get) == "ridge"


def test_best_finds_ridge_where_the_norm_is_predictable():
    """Tokens of two kinds, loud and quiet, in different directions: a map can undo the norm, a factor cannot."""
    weight, gamma, eps, _ = case(width=12)
    loud, quiet = 10 * torch.eye(6, 12).double(), torch.eye(12)[6:].double()
    inputs = [torch.cat((randn(60, 6, seed=s) @ loud, randn(60, 6, seed=s + 5) @ quiet)) for s in (1, 2, 3)]
    assert best_removal(weight, gamma, eps, inputs) == "ridge"
    errors = {m: removal_error(weight, gamma, eps, inputs, remove_norm(weight, gamma, eps, inputs, m)) for m in REMOVALS}
    assert errors["ridge"] < 0.5 * errors["scalar"]


# ---------------------------------------------------------------------------------------------------------------------
# In a mixer
# ---------------------------------------------------------------------------------------------------------------------


def mixer(bias: bool) -> GroupedQueryAttention:
    c = ModelConfig(
        vocab_size=9,
        hidden_size=10,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        layer_kinds=("gqa",),
        gqa_qk_norm=True,
        use_qkv_bias=bias,
    )
    m = GroupedQueryAttention(c, 0).double()
    with torch.no_grad():
        for i, x in enumerate(m.parameters()):
            x.copy_(randn(*x.shape, seed=i) + (1.0 if x.dim() == 1 else 0.0))
    return m


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", [*REMOVALS, "best"])
@torch.no_grad()
def test_what_is_reported_is_what_plain_rows_and_biases_do(method, bias):
    """A layer without biases must not be promised the error of a fit with one: inputs here are far from centred."""
    m = mixer(bias)
    x = randn(80, 10) + 1.0
    inputs = [torch.cat((part, torch.full((len(part), 1), float(bias), dtype=torch.float64)), dim=1) for part in x.split(40)]
    weights, errors = without_qk_norm(m, inputs, Conversion(qk_norm_removal=method))
    heads = m.query_key_value(x).unflatten(-1, (-1, 6))
    for name, part, norm in (("q", heads[:, :4], m.query_layernorm), ("k", heads[:, 4:6], m.key_layernorm)):
        rows = getattr(weights, name)
        assert bias or not rows[..., -1].any()
        plain = torch.einsum("hdm,nm->nhd", rows[..., :-1], x) + (rows[..., -1] if bias else 0.0)
        exact = norm(part)
        (reported,) = [value for key, value in errors.items() if key.startswith(name)]
        assert reported == pytest.approx(float((plain - exact).square().sum() / exact.square().sum()), rel=1e-9)
    assert all(method == "best" or f"({method})" in key for key in errors)
    assert torch.equal(weights.v[..., :-1], m.query_key_value.weight.unflatten(0, (-1, 6))[6:])


@torch.no_grad()
def test_a_mixer_without_qk_norm_is_left_alone():
    c = ModelConfig(
        vocab_size=9,
        hidden_size=10,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        layer_kinds=("gqa",),
    )
    m = GroupedQueryAttention(c, 0).double()
    weights, errors = without_qk_norm(m, [randn(5, 11)], Conversion())
    assert errors == {}
    assert torch.equal(torch.cat((weights.q, weights.k, weights.v))[..., :-1].flatten(0, 1), m.query_key_value.weight)
