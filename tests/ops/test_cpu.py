"""The CPU's own forms of ops: against the plain ones in FP64, and their gradients against finite differences.

FP32 tolerance 1e-5: sums of at most 200 products of size one. BF16: every operand, product and score rounds to 2^-9 of itself.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from openling.ops import cpu
from openling.ops.attention import LOWER_RIGHT, attention_backend, softmax_attention
from openling.ops.cpu import blockwise_attention, matmul_dtype, packed_linears, root_mean_square_norm, rotate
from openling.ops.lightning import lightning_chunk, lightning_recurrent, log_decay
from openling.ops.norm import rms_norm
from openling.ops.rope import apply_rope, rope_frequencies, rope_tables


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def bf16_pays(monkeypatch):
    """As on a CPU with BF16 products, whatever this one has."""
    monkeypatch.setattr(cpu, "bf16_matmuls_pay", lambda: True)


# ---------------------------------------------------------------------------------------------------------------------
# Attention in blocks
# ---------------------------------------------------------------------------------------------------------------------


def reference(q, k, v, scale):
    """SDPA in FP64 with the causal mask of the newest tokens."""
    new, total = q.shape[2], k.shape[2]
    mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
    q, k, v = (x.double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


@settings(max_examples=25, deadline=None)
@given(
    new=st.integers(1, 200), old=st.integers(0, 90), kv_heads=st.integers(1, 3), group=st.sampled_from((1, 3)),
    width=st.sampled_from((4, 8, 12)), dtype=st.sampled_from((torch.float32, torch.float64)),
)  # fmt: skip
def test_blocks_equal_sdpa_at_any_length(new, old, kv_heads, group, width, dtype):
    """Fewer, as many and more queries than a block, with keys before them; values narrower and wider than keys."""
    q = randn(2, kv_heads * group, new, 8, dtype=dtype)
    k, v = randn(2, kv_heads, new + old, 8, seed=1, dtype=dtype), randn(2, kv_heads, new + old, width, seed=2, dtype=dtype)
    found = blockwise_attention(q, k, v, 0.4)
    assert found.dtype == dtype
    assert (found - reference(q, k, v, 0.4)).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("group", "new", "total"), [(1, 150, 150), (2, 70, 130)])
def test_gradients_of_blocks_equal_those_of_sdpa(group, new, total):
    leaves = [randn(1, 2 * group, new, 4), randn(1, 2, total, 4, seed=1), randn(1, 2, total, 6, seed=2)]
    pull = randn(1, 2 * group, new, 6, seed=3)
    found, expected = (
        torch.autograd.grad(op(*(x.requires_grad_() for x in leaves), 0.4), leaves, pull)
        for op in (blockwise_attention, reference)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.usefixtures("bf16_pays")
def test_blocks_in_bf16_are_within_its_rounding():
    """Scores of size 3 round by 2^-9 x 3 = 6e-3, weights and outputs by 2e-3 more; gradients multiply three such factors."""
    leaves = [randn(2, 6, 200, 32, dtype=torch.bfloat16), *(randn(2, 2, 200, 32, seed=s, dtype=torch.bfloat16) for s in (1, 2))]
    pull = randn(2, 6, 200, 32, seed=3, dtype=torch.bfloat16)
    out = blockwise_attention(*(x.requires_grad_() for x in leaves), 32**-0.5)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = reference(*wide, 32**-0.5)
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 6e-3 * expected.norm()
    pairs = zip(torch.autograd.grad(out, leaves, pull), torch.autograd.grad(expected, wide, pull.double()), strict=True)
    for a, b in pairs:
        assert (a - b).norm() < 1e-2 * b.norm()


def test_long_attention_runs_in_blocks_and_short_in_sdpa(monkeypatch):
    """Also where the keys of earlier calls come before the queries; never where keys are padding."""
    used = []
    monkeypatch.setattr("openling.ops.attention.blockwise_attention", lambda *a: used.append(a) or blockwise_attention(*a))
    q, k, v = randn(1, 80, 4, 8), randn(1, 100, 2, 8, seed=1), randn(1, 100, 2, 6, seed=2)
    out = softmax_attention(q, k, v, scale=0.4)
    assert len(used) == 1
    assert (out.transpose(1, 2) - reference(*(x.transpose(1, 2) for x in (q, k, v)), 0.4)).abs().max() < 1e-12
    softmax_attention(q[:, :20], k, v, scale=0.4)
    masked = softmax_attention(q, k, v, scale=0.4, key_mask=torch.ones(1, 100))
    assert len(used) == 1
    assert (masked - out).abs().max() < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# BF16 products
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "amx", "form"), [
    (torch.bfloat16, True, "default, padded values"), (torch.bfloat16, False, "blockwise"), (torch.float32, True, "blockwise"),
])  # fmt: skip
def test_flash_attention_only_in_bf16_with_amx(monkeypatch, dtype, amx, form):
    monkeypatch.setattr("openling.ops.attention.has_amx", lambda: amx)
    q, k, v = (torch.randn(1, 2, 128, d, generator=torch.Generator().manual_seed(d)).to(dtype) for d in (24, 24, 16))
    assert attention_backend(q, k, v) == form
    assert attention_backend(q[:, :, 64:], k, v, LOWER_RIGHT) == "blockwise"
    found = softmax_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.2)
    score = 0.2 * q.double() @ k.double().transpose(-1, -2)
    score = score.masked_fill(torch.ones(128, 128, dtype=torch.bool).triu(1), float("-inf"))
    wanted = (score.softmax(-1) @ v.double()).transpose(1, 2)
    assert (found - wanted).abs().max() < (2**-7 if dtype == torch.bfloat16 else 1e-5) * wanted.abs().max()


def test_bf16_products_only_where_they_pay(monkeypatch):
    for pays, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(cpu, "bf16_matmuls_pay", lambda pays=pays: pays)
        assert matmul_dtype(torch.bfloat16) == expected
        assert matmul_dtype(torch.float16) == matmul_dtype(torch.float32) == torch.float32
        assert matmul_dtype(torch.float64) == torch.float64


def test_a_few_products_left_in_peace_are_enough(monkeypatch):
    """A clock by which most are disturbed, and take 50 times as long."""
    now, calls = [0.0], [0]

    def bmm(a, b):
        calls[0] += 1
        now[0] += (1e-4 if a.dtype == torch.bfloat16 else 3e-4) * (1 if calls[0] % 9 < 2 else 50)

    monkeypatch.setattr(cpu.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "bmm", bmm)
    assert cpu._shortest_products() == pytest.approx((1e-4, 3e-4))


def test_the_self_test_compares_times(monkeypatch, caplog):
    seconds = [1.0, 3.0]
    monkeypatch.setattr(cpu, "_shortest_products", lambda: seconds)
    monkeypatch.setattr(cpu, "_settled", None)  # a training run of another test may have settled it
    cpu.bf16_matmuls_pay.cache_clear()
    with caplog.at_level("INFO", logger="openling"):
        assert cpu.bf16_matmuls_pay()
        assert cpu.bf16_matmuls_pay()
    assert [r.message for r in caplog.records] == [
        "CPU matrix products in BF16: BF16 products run at 3.0 times the rate of FP32 ones"
    ]
    seconds[1] = 1.2
    cpu.bf16_matmuls_pay.cache_clear()
    assert not cpu.bf16_matmuls_pay()
    cpu.bf16_matmuls_pay.cache_clear()


@pytest.mark.usefixtures("bf16_pays")
@pytest.mark.parametrize("tokens", [64, 150])
def test_lightning_chunks_in_bf16(tokens):
    """Output and gradients within a few roundings of the FP64 recurrence on the same inputs; the state is exact to FP32."""
    leaves = [randn(2, tokens, 3, 16, seed=s, dtype=torch.bfloat16).requires_grad_() for s in range(3)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    g, pull = log_decay(3, 1, 6), randn(2, tokens, 3, 16, seed=4)
    (out, state), (expected, expected_state) = lightning_chunk(*leaves, g), lightning_recurrent(*wide, g.double())
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (state - expected_state).norm() < 1e-6 * expected_state.norm()
    assert (out - expected).norm() < 6e-3 * expected.norm()
    pairs = zip(torch.autograd.grad(out, leaves, pull.bfloat16()), torch.autograd.grad(expected, wide, pull), strict=True)
    for a, b in pairs:
        assert (a - b).norm() < 6e-3 * b.norm()


@pytest.mark.usefixtures("bf16_pays")
@pytest.mark.skipif(not cpu.packs_bf16(), reason="oneDNN has no BF16 products for this processor")
def test_packed_weights_give_the_same_products_and_are_gone_after_the_block(monkeypatch):
    """One row by the packed copy, several by the weights themselves; each sum of 48 products rounds once to BF16."""
    monkeypatch.setattr(cpu, "PACKED_BYTES", 0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 40), torch.nn.Linear(40, 32, bias=False)).bfloat16()
    inputs = [randn(1, n, 48, seed=n, dtype=torch.bfloat16) for n in (1, 3)]
    with torch.inference_mode():
        plain = [model(x) for x in inputs]
        wide = [(x.double() @ model[0].weight.T.double() + model[0].bias.double()) for x in inputs]
        with packed_linears(model):
            assert all(isinstance(m.__dict__["forward"], cpu._PackedLinear) for m in model)
            packed = [model(x) for x in inputs]
            first = model[0](inputs[0])
    assert all("forward" not in m.__dict__ for m in model)
    assert torch.equal(packed[1], plain[1])
    assert (packed[0] - plain[0]).norm() < 2**-8 * plain[0].norm()
    assert (first - wide[0]).abs().max() < 2**-8 * wide[0].abs().max()


def test_small_models_are_not_packed():
    for model in (torch.nn.Linear(8, 16).bfloat16(), torch.nn.Linear(8, 16)):
        with packed_linears(model) as copies:
            assert not copies
            assert "forward" not in model.__dict__
            assert model.weight.is_contiguous()


def test_fp32_weights_lie_by_columns_inside_the_block_only(monkeypatch):
    monkeypatch.setattr(cpu, "PACKED_BYTES", 0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.Linear(48, 24))
    inputs = [randn(n, 24, seed=n, dtype=torch.float32) for n in (1, 5)]
    plain = [model(x) for x in inputs]
    before = model[0].weight.clone()
    with torch.inference_mode(), packed_linears(model) as copies:
        assert not copies
        assert [m.weight.is_contiguous() for m in model] == [False, True]
        for x, expected in zip(inputs, plain, strict=True):
            assert (model(x) - expected).abs().max() < 1e-6
        model[0].weight.data.copy_(2 * before)  # new weights need no new layout
        assert torch.equal(model[0].weight, 2 * before)
    assert all(m.weight.is_contiguous() for m in model)
    model(inputs[0]).sum().backward()  # and it trains as before
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_of_one_row(dtype):
    """Within two roundings of the norm of many; not where sums must not depend on the batch, nor where gradients are wanted."""
    x, weight = randn(1, 1, 96, seed=1, dtype=dtype) * 3, randn(96, seed=2, dtype=dtype)
    expected = rms_norm(x.expand(1, 2, 96), weight, 1e-5)[:, :1]
    assert not cpu.norms_one_row(x)
    with torch.no_grad():
        assert cpu.norms_one_row(x) and not cpu.norms_one_row(x.expand(1, 2, 96))
        found = rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# Norm and rotation in few passes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
def test_norm_and_its_gradients(groups):
    x, weight = randn(2, 5, 12).requires_grad_(), randn(12, seed=1).requires_grad_()
    rows = x.unflatten(-1, (groups, -1))
    expected = weight * (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-3)).flatten(-2)
    assert (root_mean_square_norm(x, weight, 1e-3, groups) - expected).abs().max() < 1e-14
    assert torch.autograd.gradcheck(lambda *a: root_mean_square_norm(*a, 1e-3, groups), (x, weight))


def test_norm_writes_what_the_next_product_reads():
    """FP32 without autocast, BF16 with; a half-precision model's norm rounds before its weight, as PyTorch does."""
    x, weight = randn(3, 8, dtype=torch.float32), randn(8, seed=1, dtype=torch.float32)
    plain = rms_norm(x, weight, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = rms_norm(x, weight, 1e-6)
    assert (plain.dtype, cast.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(cast, plain.bfloat16())
    low, low_weight = x.bfloat16(), weight.bfloat16()
    rounded = (low.float() * torch.rsqrt(low.float().pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(rms_norm(low, low_weight, 1e-6), low_weight * rounded)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [8, 4])
def test_rotation_and_its_gradient(rotary, interleaved):
    tables = [t.double() for t in rope_tables(torch.arange(5)[None], *rope_frequencies(rotary, 100.0))]
    x = randn(2, 5, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, *tables, interleaved), (x,))
    assert torch.equal(rotate(x, *tables, interleaved), apply_rope(x, *tables, interleaved=interleaved))
