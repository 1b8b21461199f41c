"""RoPE against complex rotation, its own other pairing and transformers' frequencies; norms against their formulas in FP64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from openling.ops.norm import group_rms_norm, rms_norm
from openling.ops.rope import ROPE_TYPES, apply_rope, rope_frequencies, rope_tables, yarn_mscale


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tables(tokens, rotary, theta=10000.0, start=0):
    inv_freq, factor = rope_frequencies(rotary, theta)
    return rope_tables(torch.arange(start, start + tokens)[None], inv_freq, factor)


# ---------------------------------------------------------------------------------------------------------------------
# Rotation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(8, 8), (8, 4), (12, 6), (8, 0)])
def test_rotation_is_multiplication_by_a_unit_complex_number(dim, rotary, interleaved):
    """Pair j turns by position x theta^(-2j/r); dims from r on pass through."""
    x = randn(2, 9, 3, dim)
    out = apply_rope(x, *tables(9, rotary), interleaved=interleaved)
    for j in range(rotary // 2):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + rotary // 2)
        angle = torch.arange(9, dtype=torch.float64) * 10000.0 ** (-2 * j / rotary)
        turned = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        # cos and sin are FP32 tables: angles up to 9 are rounded to 5e-7.
        assert (torch.complex(out[..., a], out[..., b]) - turned).abs().max() < 5e-6
    assert torch.equal(out[..., rotary:], x[..., rotary:])


@settings(max_examples=30, deadline=None)
@given(pairs=st.integers(1, 8), rest=st.integers(0, 4), tokens=st.integers(1, 50), seed=st.integers(0, 99))
def test_half_split_equals_interleaved_up_to_the_permutation(pairs, rest, tokens, seed):
    """new[2j] = old[j], new[2j+1] = old[j + r/2]; on q and k alike, so scores are the same (< 1e-5, FP32)."""
    rotary = 2 * pairs
    new = torch.stack((torch.arange(pairs), torch.arange(pairs) + pairs), dim=1).flatten()
    order = torch.cat((new, torch.arange(rotary, rotary + rest)))
    cos_sin = tables(tokens, rotary)
    q, k = randn(1, tokens, 2, rotary + rest, seed=seed).float(), randn(1, tokens, 2, rotary + rest, seed=seed + 1).float()
    half = [apply_rope(x, *cos_sin) for x in (q, k)]
    inter = [apply_rope(x[..., order], *cos_sin, interleaved=True) for x in (q, k)]
    for a, b in zip(half, inter, strict=True):
        assert torch.equal(a[..., order], b)
    scores = [torch.einsum("bthd,bshd->bhts", *pair) for pair in (half, inter)]
    assert (scores[0] - scores[1]).abs().max() < 1e-5 * scores[0].abs().max()


def test_scores_depend_on_distance_only():
    q, k = randn(1, 1, 1, 16).expand(1, 6, 1, 16), randn(1, 1, 1, 16, seed=1).expand(1, 6, 1, 16)
    near, far = (
        torch.einsum("bthd,bshd->ts", apply_rope(q, *tables(6, 16, start=s)), apply_rope(k, *tables(6, 16, start=s)))
        for s in (0, 1000)
    )
    assert (near - far).abs().max() < 1e-3  # angles near 1000 have FP32 spacing 6e-5


def test_rotation_equals_transformers_llama():
    c = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16, rope_theta=5000.0)
    q, k = randn(1, 20, 2, 16).float(), randn(1, 20, 2, 16, seed=1).float()
    cos, sin = LlamaRotaryEmbedding(c)(q, torch.arange(20)[None])
    expected = [x.transpose(1, 2) for x in apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)]
    theta = c.rope_parameters["rope_theta"]
    for x, y in zip((q, k), expected, strict=True):
        assert (apply_rope(x, *tables(20, 16, theta)) - y).abs().max() < 1e-6


def test_half_precision_is_rotated_in_fp32():
    x = randn(1, 300, 1, 8)
    exact = apply_rope(x.bfloat16().double(), *tables(300, 8))
    out = apply_rope(x.bfloat16(), *tables(300, 8))
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()  # one rounding


# ---------------------------------------------------------------------------------------------------------------------
# Frequencies
# ---------------------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
SCALINGS = [
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    YARN,
    YARN | {"factor": 2.0, "original_max_position_embeddings": 131072},
    YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    YARN | {"truncate": False},
    YARN | {"attention_factor": 1.25},
    YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
]


@pytest.mark.parametrize("theta", [10000.0, 6e6])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_scaled_frequencies_equal_transformers(scaling, theta):
    c = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
        rope_parameters=scaling | {"rope_theta": theta},
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](c, torch.device("cpu"))
    found, factor = rope_frequencies(64, theta, scaling)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-9)
    assert not torch.equal(found, rope_frequencies(64, theta)[0])


def test_plain_frequencies():
    """theta^(-2j/r), for every way of saying that there is no scaling."""
    expected = torch.tensor([6e6 ** (-2 * j / 64) for j in range(32)])
    for scaling in (None, {"rope_type": "default"}, {"type": "default"}, {}):
        found, factor = rope_frequencies(64, 6e6, scaling)
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)
        assert factor == 1.0


def test_published_yarn_attention_factors():
    """Ling-2.6-flash served at 256K: YaRN x2 on 131072, factor 0.1 ln 2 + 1 = 1.0693."""
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 131072}
    found, factor = rope_frequencies(64, 6e6, scaling)
    assert round(factor, 4) == 1.0693
    plain = rope_frequencies(64, 6e6)[0]
    assert torch.equal(found[0], plain[0])  # fast pairs stay
    assert torch.allclose(found[-1], plain[-1] / 2)  # slow pairs are interpolated
    assert yarn_mscale(1.0) == yarn_mscale(0.5) == 1.0
    assert yarn_mscale(40.0, 0.707) == pytest.approx(0.1 * 0.707 * math.log(40) + 1)


def test_the_factor_multiplies_cos_and_sin():
    positions, inv_freq = torch.arange(5)[None], rope_frequencies(8, 10000.0)[0]
    (cos, sin), (cos2, sin2) = (rope_tables(positions, inv_freq, f) for f in (1.0, 1.5))
    assert cos.shape == (1, 5, 1, 4)
    assert torch.allclose(cos2, 1.5 * cos)
    assert torch.allclose(sin2, 1.5 * sin)


def test_unknown_scaling_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=", ".join(ROPE_TYPES)):
        rope_frequencies(8, 10000.0, {"rope_type": "longrope"})


# ---------------------------------------------------------------------------------------------------------------------
# Norms
# ---------------------------------------------------------------------------------------------------------------------


def test_rms_norm_equals_the_formula():
    x, weight = randn(3, 7, 10), randn(10, seed=1)
    expected = weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(rms_norm(x, weight, 1e-6), expected, rtol=1e-14, atol=0)
    assert (rms_norm(x.float(), weight.float(), 1e-6) - expected).abs().max() < 1e-6
    single = rms_norm(x, weight, 1e-6)
    assert torch.allclose(group_rms_norm(x, weight, 1e-6, 1), single, rtol=1e-14, atol=0)


def test_rms_norm_of_half_precision_is_computed_in_fp32_and_rounded_before_the_weight():
    """Trap T5: the official code's order of roundings, bit for bit."""
    x, weight = (1e3 * randn(2, 64)).bfloat16(), randn(64, seed=1).bfloat16()
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), expected)
    assert torch.equal(rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-6), torch.zeros(1, 4))


@pytest.mark.parametrize("groups", [1, 2, 3, 6, 12])
def test_groups_are_counted_and_contiguous(groups):
    """Trap T8: `group_norm_size` is the number of groups; group i holds channels i C/G .. (i+1) C/G."""
    x, weight = randn(4, 12), randn(12, seed=1)
    out = group_rms_norm(x, weight, 1e-6, groups)
    width = 12 // groups
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        expected = weight[part] * x[:, part] / (x[:, part].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert torch.allclose(out[:, part], expected, rtol=1e-13, atol=0)


def test_a_group_does_not_feel_the_others():
    x = randn(1, 12)
    louder = torch.cat((x[:, :4], 100 * x[:, 4:]), dim=1)
    a, b = (group_rms_norm(v, torch.ones(12).double(), 0.0, 3) for v in (x, louder))
    assert torch.equal(a[:, :4], b[:, :4])
    assert torch.allclose(a, b, rtol=1e-12)
    assert not torch.allclose(group_rms_norm(x, torch.ones(12).double(), 0.0, 4), a)
