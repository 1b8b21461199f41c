"""Softmax attention and MLA's absorbed form against sums written out in FP64.

FP64 tolerance 1e-12: at most 100 terms of order one. FP32: 1e-5 for plain attention; 1e-4 is what the identity asks of the
absorbed form, whose products are longer by the latent rank.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openling.ops import attention
from openling.ops.attention import absorbed_attention, absorbed_is_cheaper, causal_mask, softmax_attention

FP64 = 1e-12


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def explicit(q, k, v, scale, key_mask=None):
    """Query by query, head by head; the T queries are the newest of S positions; head h reads K/V head h // (H / K)."""
    batch, new, heads, _ = q.shape
    total, group = k.shape[1], heads // k.shape[2]
    out = torch.zeros(batch, new, heads, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for t in range(new):
            at = total - new + t
            seen = [s for s in range(at + 1) if key_mask is None or key_mask[b, s] or s == at]
            for h in range(heads):
                weight = torch.softmax(scale * k[b, seen, h // group].double() @ q[b, t, h].double(), dim=0)
                out[b, t, h] = weight @ v[b, seen, h // group].double()
    return out


@settings(max_examples=30, deadline=None)
@given(
    new=st.integers(1, 7),
    old=st.integers(0, 7),
    kv_heads=st.sampled_from((1, 2, 3)),
    group=st.sampled_from((1, 2, 4)),
    value_dim=st.sampled_from((4, 6)),
    padding=st.sampled_from((None, 0, 2, 3)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_equals_explicit_softmax(new, old, kv_heads, group, value_dim, padding, dtype):
    total = new + old
    q = randn(2, new, kv_heads * group, 4, seed=1, dtype=dtype)
    k, v = randn(2, total, kv_heads, 4, seed=2, dtype=dtype), randn(2, total, kv_heads, value_dim, seed=3, dtype=dtype)
    mask = None
    if padding is not None:
        mask = torch.ones(2, total, dtype=torch.bool)
        mask[1, : min(padding, total)] = False
    out = softmax_attention(q, k, v, scale=0.4, key_mask=mask)
    assert out.dtype == dtype
    assert (out - explicit(q, k, v, 0.4, mask)).abs().max() < (FP64 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("new", "total"), [(1, 2), (5, 6), (3, 20), (64, 65)])
def test_two_parts_are_the_whole(monkeypatch, new, total):
    """Joining by log-sum-exps, with both parts written out; scores of 30 and more make either part negligible at times."""

    def written_out(q, k, v, scale, *, causal):
        score = (q.double() @ k.double().transpose(-1, -2)) * scale
        if causal:
            score = score.masked_fill(torch.ones(score.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        return (score.softmax(-1) @ v.double()).float(), score.logsumexp(-1).float()

    monkeypatch.setattr(attention, "_with_log_sum", written_out)
    q, k, v = randn(2, 3, new, 8, dtype=torch.float32) * 9, randn(2, 3, total, 8, seed=1), randn(2, 3, total, 6, seed=2)
    found = attention._in_two_parts(q, k, v, 8**-0.5)
    wanted = explicit(*(x.transpose(1, 2) for x in (q, k, v)), 8**-0.5).transpose(1, 2)
    # Log-sums of up to 100 in FP32: 100 * 2^-24 of a share, and as much again of rounding.
    assert (found - wanted).abs().max() < 1.2e-5 * wanted.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("new", "total"), [(512, 600), (1000, 4103), (2048, 2049)])
def test_two_parts_on_a_gpu(new, total):
    """A chunk of a long prompt through cuDNN, MLA's widths: the weights and the result are rounded to BF16."""
    shapes = (new, 192), (total, 192), (total, 128)
    q, k, v = (randn(1, n, 4, d, seed=i, dtype=torch.bfloat16).cuda() for i, (n, d) in enumerate(shapes))
    with torch.no_grad():
        used = attention.attention_backend(*(x.transpose(1, 2) for x in (q, k, v)), attention.LOWER_RIGHT)
        found = softmax_attention(q, k, v, scale=192**-0.5).double()
    assert used == "cudnn, two parts" or torch.cuda.get_device_capability() < (9, 0)
    score = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) * 192**-0.5
    score = score.masked_fill(~causal_mask(new, total, None, q.device), float("-inf"))
    wanted = torch.einsum("bhts,bshd->bthd", score.softmax(-1), v.double())
    # Three roundings of at most 2^-8 / sqrt(3) in the mean: weights, both parts' results, what they are joined to.
    assert (found - wanted).square().mean().sqrt() < 2**-8 * wanted.square().mean().sqrt()


def test_query_heads_read_their_groups_key_head():
    """Six query heads on two K/V heads: 0-2 read the first, 3-5 the second."""
    q, k = randn(1, 5, 6, 4), randn(1, 5, 2, 4, seed=1)
    v = torch.stack((torch.zeros(1, 5, 4), torch.ones(1, 5, 4)), dim=2).double()
    out = softmax_attention(q, k, v, scale=0.5)
    assert not out[:, :, :3].any()
    assert torch.allclose(out[:, :, 3:], torch.ones_like(out[:, :, 3:]))


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda x: sum(x) > 0))
def test_packed_documents_equal_separate_ones(lengths):
    total = sum(lengths)
    q, k, v = randn(1, total, 4, 4), randn(1, total, 2, 4, seed=1), randn(1, total, 2, 4, seed=2)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    out = softmax_attention(q, k, v, scale=0.5, cu_seqlens=torch.tensor(bounds))
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        if a < b:
            assert (out[:, a:b] - explicit(q[:, a:b], k[:, a:b], v[:, a:b], 0.5)).abs().max() < FP64
    assert out.shape == q.shape


def test_left_padding_equals_the_sequence_without_it():
    q, k, v = randn(1, 9, 2, 4), randn(1, 9, 2, 4, seed=1), randn(1, 9, 2, 4, seed=2)
    padded = [torch.cat((100 * randn(1, 3, 2, 4, seed=7), x), dim=1) for x in (q, k, v)]
    mask = torch.tensor([[0, 0, 0] + [1] * 9])
    out = softmax_attention(*padded, scale=0.5, key_mask=mask)
    assert torch.isfinite(out).all()
    assert (out[:, 3:] - softmax_attention(q, k, v, scale=0.5)).abs().max() < FP64


def test_mask_of_a_padded_query_is_not_empty():
    mask = causal_mask(3, 3, torch.tensor([[0, 0, 1]]), torch.device("cpu"))
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, False], [False, False, True]]


# ---------------------------------------------------------------------------------------------------------------------
# MLA: absorbed == expanded (migration.md 10: < 1e-4)
# ---------------------------------------------------------------------------------------------------------------------


def expanded(q_nope, q_rope, latent, k_rope, kv_b, nope, scale, key_mask=None):
    """Keys and values made for every head, then the explicit softmax."""
    kv = torch.einsum("bsr,hdr->bshd", latent, kv_b)
    k = torch.cat((kv[..., :nope], k_rope[:, :, None].expand(-1, -1, kv_b.shape[0], -1)), dim=-1)
    return explicit(torch.cat((q_nope, q_rope), dim=-1), k, kv[..., nope:], scale, key_mask)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("new", "total", "padding"), [(1, 11, 0), (1, 11, 4), (3, 11, 0), (3, 11, 9), (6, 6, 0), (6, 6, 2)])
def test_absorbed_equals_expanded_mla(new, total, padding, dtype, tolerance):
    """One and several new tokens, with and without padded keys."""
    heads, nope, rope, value, rank = 3, 5, 4, 6, 7
    q_nope, q_rope = randn(2, new, heads, nope, seed=1, dtype=dtype), randn(2, new, heads, rope, seed=2, dtype=dtype)
    latent, k_rope = randn(2, total, rank, seed=3, dtype=dtype), randn(2, total, rope, seed=4, dtype=dtype)
    kv_b = randn(heads, nope + value, rank, seed=5, dtype=dtype)
    mask = None
    if padding:
        mask = torch.ones(2, total, dtype=torch.bool)
        mask[0, :padding] = False
    found = absorbed_attention(q_nope, q_rope, latent, k_rope, kv_b, nope, scale=0.3, key_mask=mask)
    assert found.shape == (2, new, heads, value)
    assert (found - expanded(q_nope, q_rope, latent, k_rope, kv_b, nope, 0.3, mask)).abs().max() < tolerance


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("rank", "nope", "value"), [(16, 4, 4), (16, 8, 4), (8, 8, 8), (12, 3, 5), (4, 8, 8)])
def test_the_cheaper_form_is_the_one_with_fewer_counted_flops(rank, nope, value):
    """Counted at a context where the queries' own absorption (no multiple of the context) is 1 % or less of the rest."""
    heads, rope, total = 2, 2, 4000
    latent, k_rope, kv_b = torch.zeros(1, total, rank), torch.zeros(1, total, rope), torch.zeros(heads, nope + value, rank)
    seen = set()
    for new in (1, 2, 3, 4, 5, 8, 16):
        q_nope, q_rope = torch.zeros(1, new, heads, nope), torch.zeros(1, new, heads, rope)

        def expand(q_nope=q_nope, q_rope=q_rope):
            kv = torch.nn.functional.linear(latent, kv_b.flatten(0, 1)).unflatten(-1, (heads, -1))
            k = torch.cat((kv[..., :nope], k_rope[:, :, None].expand(-1, -1, heads, -1)), dim=-1)
            softmax_attention(torch.cat((q_nope, q_rope), -1), k, kv[..., nope:], scale=1.0)

        def absorb(q_nope=q_nope, q_rope=q_rope):
            absorbed_attention(q_nope, q_rope, latent, k_rope, kv_b, nope, scale=1.0)

        counted_absorbed, counted_expanded = flops(absorb), flops(expand)
        per_key = (new * (2 * rank - nope - value), rank * (nope + value))
        if per_key[0] != per_key[1]:
            assert absorbed_is_cheaper(new, rank, nope, value) == (counted_absorbed < counted_expanded), new
        seen.add(absorbed_is_cheaper(new, rank, nope, value))
    assert seen == ({True} if 2 * rank <= nope + value else {True, False})


def test_ling_26_absorbs_up_to_170_new_tokens():
    """512 x 256 / (1024 - 256) = 170.7."""
    assert absorbed_is_cheaper(170, 512, 128, 128)
    assert not absorbed_is_cheaper(171, 512, 128, 128)


def test_inner_tensors_follow_the_inputs_device():
    """Whatever is made without a device lands on `meta` here, and meeting CPU tensors it fails."""
    q, k, latent, kv_b, bounds = randn(1, 3, 2, 4), randn(1, 5, 2, 4), randn(1, 5, 6), randn(2, 8, 6), torch.tensor([0, 1, 3])
    mask = torch.ones(1, 5, dtype=torch.bool)
    with torch.device("meta"):
        softmax_attention(q, k, k, scale=1.0, key_mask=mask)
        softmax_attention(q, q, q, scale=1.0, cu_seqlens=bounds)
        absorbed_attention(q, q, latent, k[:, :, 0], kv_b, 4, scale=1.0, key_mask=mask)
