"""The chunked loss against the plain formula in FP64, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from openling.ops.loss import head_loss, target_loss


def _inputs(batch, tokens, width, vocab, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    h, weight = torch.randn(batch, tokens, width, generator=g), torch.randn(vocab, width, generator=g)
    teacher_h, teacher_weight = torch.randn(batch, tokens, width + 3, generator=g), torch.randn(vocab, width + 3, generator=g)
    ids = torch.randint(vocab, (batch, tokens), generator=g)
    h, weight = h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    return h, weight, ids, teacher_h.to(dtype), teacher_weight.to(dtype)


def _plain(h, weight, ids, teacher_h, teacher_weight, ce_weight, kl_weight):
    """torch's own cross_entropy and kl_div on whole logits."""
    logits, teacher = (h @ weight.T)[:, :-1].flatten(0, 1), (teacher_h @ teacher_weight.T)[:, :-1].flatten(0, 1)
    ce = F.cross_entropy(logits, ids[:, 1:].flatten())
    kl = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    same = (logits.argmax(-1) == teacher.argmax(-1)).double().mean()
    return ce_weight * ce + kl_weight * kl, ce, kl, same


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(2, 9),
    vocab=st.integers(2, 40),
    chunk=st.integers(1, 400),
    weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)]),
)
def test_matches_plain_formula_in_float64(batch, tokens, vocab, chunk, weights):
    inputs = _inputs(batch, tokens, 5, vocab)
    h, weight, ids, teacher_h, teacher_weight = inputs
    expected, ce, kl, same = _plain(*inputs, *weights)
    expected_grads = torch.autograd.grad(expected * 1.7, (h, weight))
    out = head_loss(
        h, weight, ids, teacher_h_BTM=teacher_h, teacher_weight_VM=teacher_weight,
        ce_weight=weights[0], kl_weight=weights[1], agreement=True, chunk_values=chunk,
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss * 1.7, (h, weight))
    # FP64 sums of at most 24 x 40 terms of size about 10: rounding below 1e3 * 10 * 1.1e-16.
    for a, b in ((out.loss, expected), (out.ce, ce), (out.kl, kl), *zip(grads, expected_grads, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert out.agreement == same


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_within_rounding_of_float64(autocast):
    h, weight, ids, teacher_h, teacher_weight = (
        x.detach().float() if x.is_floating_point() else x for x in _inputs(2, 33, 64, 300)
    )
    h, weight = (h * 0.1).requires_grad_(), weight.requires_grad_()
    teacher_h = teacher_h * 0.1
    expected = _plain(h.double(), weight.double(), ids, teacher_h.double(), teacher_weight.double(), 1.0, 1.0)[0]
    expected_grads = torch.autograd.grad(expected, (h, weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = head_loss(
            h, weight, ids, teacher_h_BTM=teacher_h, teacher_weight_VM=teacher_weight, kl_weight=1.0, chunk_values=3000
        )  # fmt: skip
    grads = torch.autograd.grad(out.loss, (h, weight))
    # Inputs, logits and products each round once: 2^-8 relative in BF16, 2^-23 in FP32 with sums of 300 terms.
    tolerance = 4 * 2**-8 if autocast else 300 * 2**-23
    assert out.loss.dtype == grads[0].dtype == torch.float32
    assert abs(out.loss.item() - expected.item()) < tolerance * expected.item()
    for a, b in zip(grads, expected_grads, strict=True):
        assert (a - b).norm() < tolerance * b.norm()


def test_kl_to_itself_is_zero_and_has_no_gradient():
    h, weight, ids, _, _ = _inputs(2, 17, 8, 50, dtype=torch.float32)
    out = head_loss(
        h, weight, ids, teacher_h_BTM=h, teacher_weight_VM=weight, ce_weight=0.0, kl_weight=1.0, agreement=True, chunk_values=200
    )
    (grad,) = torch.autograd.grad(out.loss, h)
    assert float(out.kl) == 0.0
    assert float(out.agreement) == 1.0
    # p is exp(a - lse) on both sides, in the same order of operations: equal bit for bit.
    assert float(grad.abs().max()) == 0.0


def test_frozen_head_gets_no_gradient_and_no_grad_none_at_all():
    h, weight, ids, _, _ = _inputs(2, 5, 4, 11)
    weight.requires_grad_(False)
    head_loss(h, weight, ids).loss.backward()
    assert weight.grad is None
    assert h.grad is not None
    with torch.no_grad():
        assert not head_loss(h, weight, ids).loss.requires_grad


@pytest.mark.parametrize("z_weight", [0.0, 0.3])
def test_shares_of_parts_add_up_to_the_mean_with_z(z_weight):
    """Three parts of the rows, each divided by all rows' count, against the formula on all of them."""
    h, weight, _, _, _ = _inputs(1, 13, 5, 20)
    targets = torch.randint(20, (13,), generator=torch.Generator().manual_seed(3))
    logits = h[0] @ weight.T
    expected = F.cross_entropy(logits, targets) + z_weight * logits.logsumexp(-1).square().mean()
    expected_grads = torch.autograd.grad(expected, (h, weight))
    cuts = [(0, 4), (4, 4), (4, 13)]  # the middle one has no token at all
    parts = [target_loss(h[0, a:b], weight, targets[a:b], z_weight=z_weight, denominator=13, chunk_values=50) for a, b in cuts]
    total = sum(p.loss for p in parts)
    grads = torch.autograd.grad(total, (h, weight))
    for a, b in ((total, expected), *zip(grads, expected_grads, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert (parts[0].z is None) == (z_weight == 0)
