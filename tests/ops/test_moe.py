"""Router and expert sum against loops written out in FP64, and against three routers of transformers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from openling.ops.moe import block_fp8_experts, combine_experts, count_tokens, dequantize_blocks, moe, route, swiglu_experts


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x, weight, bias, *, top_k, n_group, topk_group, score_function, norm_topk_prob, scaling_factor):
    """Token by token with Python's sort: {expert: weight}."""
    out = []
    for row in (x.double() @ weight.double().T).tolist():
        logits = torch.tensor(row, dtype=torch.float64)
        scores = (logits.sigmoid() if score_function == "sigmoid" else logits.softmax(0)).tolist()
        biased = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        size = len(biased) // n_group
        groups = [biased[g * size : (g + 1) * size] for g in range(n_group)]
        ranking = sorted(range(n_group), key=lambda g: -sum(sorted(groups[g])[-2:]))
        allowed = [e for g in ranking[:topk_group] for e in range(g * size, (g + 1) * size)]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:top_k]
        total = sum(scores[e] for e in chosen) if norm_topk_prob and top_k > 1 else 1.0
        out.append({e: scores[e] / total * scaling_factor for e in chosen})
    return out


def as_dicts(weight, index):
    return [dict(zip(i, w, strict=True)) for w, i in zip(weight.tolist(), index.tolist(), strict=True)]


def same(found, expected, tolerance):
    assert [set(a) for a in found] == [set(b) for b in expected]
    assert max(abs(a[e] - b[e]) for a, b in zip(found, expected, strict=True) for e in b) < tolerance


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from((1, 2, 4)),
    size=st.integers(2, 4),
    data=st.data(),
    score=st.sampled_from(("sigmoid", "softmax")),
    norm=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 999),
)
def test_routing_equals_the_formula(groups, size, data, score, norm, biased, seed):
    kept = data.draw(st.integers(1, groups))
    options = {
        "top_k": data.draw(st.integers(1, kept * size)),
        "n_group": groups,
        "topk_group": kept,
        "score_function": score,
        "norm_topk_prob": norm,
        "scaling_factor": 2.5,
    }
    x, weight = randn(7, 5, seed=seed), randn(groups * size, 5, seed=seed + 1)
    bias = randn(groups * size, seed=seed + 2) if biased else None
    found, index = route(x, weight, bias, **options)
    assert found.dtype == torch.float64
    same(as_dicts(found, index), by_hand(x, weight, bias, **options), 1e-12)


def test_bias_changes_the_selection_but_not_the_weights():
    x, weight = randn(50, 6), randn(8, 6, seed=1)
    bias = torch.zeros(8).double()
    bias[3] = 10.0
    (plain, plain_index), (shifted, shifted_index) = (route(x, weight, b, top_k=2) for b in (None, bias))
    assert (shifted_index == 3).any(-1).all()
    assert not (plain_index == 3).any(-1).all()
    scores = (x @ weight.T).sigmoid().gather(-1, shifted_index)
    assert torch.allclose(shifted, scores / scores.sum(-1, keepdim=True), rtol=0, atol=1e-12)
    kept = (shifted_index.sort().values == plain_index.sort().values).all(-1)
    assert kept.any()
    assert torch.allclose(shifted[kept].sort().values, plain[kept].sort().values)


def test_scores_are_fp32_whatever_the_activations_are():
    """Trap T3: two experts whose BF16 logits tie are still told apart."""
    x = torch.ones(1, 2).bfloat16()
    weight = torch.tensor([[1.0, 0.0], [1.0, 2**-12]])
    with torch.autocast("cpu", torch.bfloat16):
        found, index = route(x, weight, None, top_k=1, norm_topk_prob=False)
    assert index.tolist() == [[1]]
    assert found.dtype == torch.float32


def test_groups_that_lost_never_win_by_negative_scores():
    """Trap T4: all biased scores are negative; a loser masked with 0 instead of -inf would be chosen."""
    x, weight = randn(20, 4), randn(8, 4, seed=1)
    bias = torch.full((8,), -5.0).double()
    bias[4:] -= 1.0  # the second group loses
    _, index = route(x, weight, bias, top_k=3, n_group=2, topk_group=1)
    assert (index < 4).all()


def test_group_score_is_the_sum_of_the_two_best():
    """Group 0 holds the single best expert, group 1 the best pair."""
    weight = torch.tensor([2.0, -9.0, -9.0, 1.5, 1.4, -9.0]).double()[:, None]
    _, index = route(torch.ones(1, 1).double(), weight, None, top_k=2, n_group=2, topk_group=1)
    assert sorted(index[0].tolist()) == [3, 4]


def test_ties_give_distinct_experts_and_equal_weights():
    found, index = route(randn(5, 4), torch.zeros(8, 4).double(), None, top_k=4, n_group=2, topk_group=1, scaling_factor=2.0)
    assert all(len(set(row)) == 4 for row in index.tolist())
    assert all(len({e // 4 for e in row}) == 1 for row in index.tolist())
    assert torch.equal(found, torch.full((5, 4), 0.5).double())


def test_one_expert_is_not_renormalised():
    found, index = route(randn(9, 4), randn(6, 4, seed=1), None, top_k=1)
    assert torch.allclose(found, (randn(9, 4) @ randn(6, 4, seed=1).T).sigmoid().gather(-1, index))


# ---------------------------------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------------------------------


def deepseek(experts=16, hidden=12):
    return DeepseekV3Config(
        hidden_size=hidden,
        n_routed_experts=experts,
        num_local_experts=experts,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=6,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )


def test_router_equals_deepseek_v3():
    other = DeepseekV3TopkRouter(deepseek())
    other.weight.data = randn(16, 12).float()
    other.e_score_correction_bias.data = randn(16, seed=1).float()
    x = randn(200, 12, seed=2).float()
    _, weight, index = other(x)
    options = {"top_k": 4, "n_group": 4, "topk_group": 2, "scaling_factor": 2.5}
    found = route(x, other.weight, other.e_score_correction_bias, **options)
    same(as_dicts(*found), as_dicts(weight, index), 1e-6)


@pytest.mark.parametrize("norm", [True, False])
def test_router_equals_qwen3_moe_and_mixtral(norm):
    x, weight = randn(200, 12).float(), randn(8, 12, seed=1).float()
    found = as_dicts(*route(x, weight, None, top_k=2, score_function="softmax", norm_topk_prob=norm))
    c = Qwen3MoeConfig(hidden_size=12, num_experts=8, num_experts_per_tok=2, norm_topk_prob=norm)
    others = [Qwen3MoeTopKRouter(c)]
    if norm:
        others.append(MixtralTopKRouter(MixtralConfig(hidden_size=12, num_local_experts=8, num_experts_per_tok=2)))
    for other in others:
        other.weight.data = weight
        same(found, as_dicts(*other(x)[1:]), 1e-6)


def test_experts_equal_deepseek_v3():
    torch.manual_seed(0)
    other = DeepseekV3MoE(deepseek())
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    x = randn(1, 30, 12).float()
    with torch.no_grad():
        expected = (other(x) - other.shared_experts(x))[0]
        weight, index = route(x[0], other.gate.weight, None, top_k=4, n_group=4, topk_group=2, scaling_factor=2.5)

        def run(e, rows):
            gate, up = F.linear(rows, other.experts.gate_up_proj[e]).chunk(2, -1)
            return F.linear(F.silu(gate) * up, other.experts.down_proj[e])

        found = combine_experts(x[0], weight, index, 16, run)
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5  # FP32, another order of summation


# ---------------------------------------------------------------------------------------------------------------------
# The sum
# ---------------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 12), experts=st.integers(1, 6), data=st.data(), seed=st.integers(0, 99))
def test_combination_equals_a_loop_in_value_and_gradient(tokens, experts, data, seed):
    """Experts that nobody chose are not run; no token is no error."""
    k = data.draw(st.integers(1, experts))
    index = (
        torch.stack([randn(experts, seed=seed + t).argsort()[:k] for t in range(tokens)]) if tokens else torch.zeros(0, k).long()
    )
    ran = []
    gradients = []
    for form in ("op", "loop"):
        x, w, m = (
            randn(tokens, 3).requires_grad_(),
            randn(tokens, k, seed=1).requires_grad_(),
            randn(experts, 3, 3, seed=2).requires_grad_(),
        )

        def run(e, rows, m=m):
            ran.append(e)
            return (rows @ m[e]).tanh()

        if form == "op":
            out = combine_experts(x, w, index, experts, run)
        else:
            rows = [sum(w[t, j] * (x[t] @ m[int(index[t, j])]).tanh() for j in range(k)) for t in range(tokens)]
            out = torch.stack(rows) if rows else x[:0]
        gradients.append([out, *torch.autograd.grad(out.pow(2).sum() + 0 * (x.sum() + w.sum() + m.sum()), (x, w, m))])
    assert ran == sorted(set(index.flatten().tolist()))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_the_sum_is_accumulated_in_fp32():
    """256 contributions of 1/256 beside 1: in BF16 each would vanish (spacing 1/128 above 1)."""
    weight = torch.tensor([[1.0] + [1 / 256] * 256])
    index = torch.arange(257)[None]
    out = combine_experts(torch.ones(1, 2).bfloat16(), weight, index, 257, lambda e, rows: rows)
    assert out.dtype == torch.bfloat16
    assert out.tolist() == [[2.0, 2.0]]


def test_inner_tensors_follow_the_inputs_device():
    x, weight, bias = randn(5, 4), randn(8, 4), randn(8)
    with torch.device("meta"):
        found, index = route(x, weight, bias, top_k=2, n_group=2, topk_group=1)
        combine_experts(x, found, index, 8, lambda e, rows: rows)


# ---------------------------------------------------------------------------------------------------------------------
# The whole layer
# ---------------------------------------------------------------------------------------------------------------------


def test_the_layer_is_router_and_experts_and_counts_its_tokens():
    x, router, bias = randn(30, 6), randn(8, 6, seed=1), randn(8, seed=2)
    gate, up, down = randn(8, 5, 6, seed=3), randn(8, 5, 6, seed=4), randn(8, 6, 5, seed=5)
    options = {"top_k": 3, "n_group": 2, "topk_group": 1, "scaling_factor": 2.5}
    out, counts = moe(x, router, bias, gate, up, down, **options)
    weight, index = route(x, router, bias, **options)
    assert torch.equal(out, swiglu_experts(x, weight, index, gate, up, down))
    assert counts.tolist() == index.flatten().bincount(minlength=8).tolist() == count_tokens(index, 8).tolist()
    rows = [
        sum(weight[n, j] * (down[e] @ (F.silu(gate[e] @ x[n]) * (up[e] @ x[n]))) for j, e in enumerate(index[n]))
        for n in range(30)
    ]
    assert torch.allclose(out, torch.stack(rows), rtol=0, atol=1e-12)


def test_blocks_are_dequantised_to_the_edge():
    weight = randn(2, 130, 200).to(torch.float8_e4m3fn)
    scale = randn(2, 2, 2, seed=1).abs().float()
    wide = dequantize_blocks(weight, scale, torch.float64)
    for e, r, c in ((0, 0, 0), (1, 127, 127), (0, 128, 0), (1, 129, 199), (0, 5, 130)):
        assert wide[e, r, c] == (weight[e, r, c].float() * scale[e, r // 128, c // 128]).double()
    gate = up = (weight[:, :128, :128], scale[:, :1, :1])
    x, index = randn(4, 128), torch.tensor([[0, 1]] * 4)
    found = block_fp8_experts(x, torch.ones(4, 2), index, (gate[0], up[0], gate[0]), (gate[1], up[1], gate[1]))
    expected = swiglu_experts(x, torch.ones(4, 2), index, *[dequantize_blocks(*gate, torch.float64)] * 3)
    assert torch.equal(found, expected)
