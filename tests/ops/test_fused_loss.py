"""The loss kernel against torch's cross-entropy and KL in FP64, and `head_loss` through it.

Tolerances. The kernel gets logits x as the matrix product left them and computes in FP32. An exponent x log2(e) - lse carries the
FP32 rounding of its parts, 2^-24 (|x| + |lse|) log2(e) each, so a probability is off by (20 + 4 max|x|) 2^-24 of itself; the sums
over V values add log2(V) roundings at most, since threads sum apart and then pairwise. The gradient is rounded once more to the
logits' dtype: u = 2^-8 in BF16. Half-precision logits are the kernel's input, so what they lost in the matrix product is not its
error; the last test measures that loss.
"""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import openling.ops.loss as loss_module
from openling.ops import kernels
from openling.ops.loss import head_loss

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter truncates to BF16 where hardware rounds
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}

on_gpu = pytest.mark.skipif(not CUDA, reason="real shapes in BF16 need a GPU")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def problem(tokens, vocabulary, scale, dtype, pad=0):
    """Student's and teacher's logits with `pad` values between rows, targets; the last row has equal logits everywhere."""
    x = randn(tokens, vocabulary + pad) * scale
    y = (x + 0.3 * scale * randn(tokens, vocabulary + pad, seed=1)).to(dtype)
    x[-1] = 1.5
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    targets[0], targets[-1] = vocabulary - 1, 0
    return x.to(dtype)[:, :vocabulary], y[:, :vocabulary], targets


def exact_losses(x, y, targets, ce_weight, kl_weight):
    """ce and kl per token and the gradient of their weighted sum, FP64."""
    x = x.detach().double().requires_grad_()
    ce = F.cross_entropy(x, targets, reduction="none")
    kl = torch.zeros_like(ce)
    if y is not None:
        kl = F.kl_div(x.log_softmax(-1), y.double().log_softmax(-1), log_target=True, reduction="none").sum(-1)
    (grad,) = torch.autograd.grad((ce_weight * ce + kl_weight * kl).sum(), x)
    return ce.detach(), kl.detach(), grad


def check(tokens, vocabulary, scale, dtype, teacher, pad=0, ce_weight=0.3, kl_weight=1.7):
    x, y, targets = problem(tokens, vocabulary, scale, dtype, pad)
    y = y if teacher else None
    ce, kl, grad = exact_losses(x, y, targets, ce_weight, kl_weight)
    same = (x.argmax(-1) == y.argmax(-1)).float() if teacher else torch.zeros(tokens, device=DEVICE)
    found_grad = x.clone()
    found = kernels.head_losses(found_grad, y, targets, ce_weight, kl_weight, True, True)
    relative = (20 + 4 * float(x.abs().max()) + math.log2(vocabulary)) * 2**-24
    largest = float(x.abs().max()) + math.log(vocabulary)
    assert (found[:, 0] - ce).abs().max() <= relative * largest
    assert (found[:, 1] - kl).abs().max() <= 2 * relative * largest
    assert torch.equal(found[:, 2], same)
    # Gradients are differences of probabilities of at most 1, each relatively exact.
    parts = ce_weight * x.double().softmax(-1) + (kl_weight * (x.double().softmax(-1) + y.double().softmax(-1)) if teacher else 0)
    parts.scatter_add_(1, targets[:, None], torch.full_like(targets[:, None], ce_weight, dtype=torch.float64))
    assert ((found_grad.double() - grad).abs() <= UNIT[dtype] * grad.abs() + relative * parts + 2**-25).all()


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "scale", "pad"),
    [(3, 300, 1.0, 4), (2, 20011, 5.0, 0), (4, 7, 30.0, 1), (1, 512, 1.0, 0), (2, 1, 1.0, 0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_losses_and_gradient(tokens, vocabulary, scale, pad, dtype, teacher):
    check(tokens, vocabulary, scale, dtype, teacher, pad)


@on_gpu
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("vocabulary", [157184, 49152, 151669])
def test_losses_and_gradient_in_bf16(vocabulary, teacher):
    check(517, vocabulary, 3.0, torch.bfloat16, teacher)


def test_kl_to_itself_is_zero_and_has_no_gradient():
    x, _, targets = problem(3, 5000, 4.0, torch.float32)
    grad = x.clone()
    found = kernels.head_losses(grad, x, targets, 0.0, 1.0, True, True)
    assert float(found[:, 1].abs().max()) == float(grad.abs().max()) == 0.0
    assert found[:, 2].tolist() == [1.0] * 3


def test_logits_stay_where_no_gradient_is_asked():
    x, y, targets = problem(3, 700, 4.0, torch.float32)
    kept = x.clone()
    found = kernels.head_losses(x, y, targets, 1.0, 1.0, False, False)
    assert torch.equal(x, kept)
    assert float(found[:, 2].abs().max()) == 0.0


def test_padding_of_the_vocabulary_with_minus_infinity():
    x, _, targets = problem(2, 700, 4.0, torch.float32)
    x[:, 600:] = -math.inf
    targets %= 600
    ce, _, grad = exact_losses(x[:, :600], None, targets, 1.0, 0.0)
    found = kernels.head_losses(x, None, targets, 1.0, 0.0, False, True)
    assert (found[:, 0] - ce).abs().max() < 1e-5
    assert (x[:, :600] - grad).abs().max() < 1e-6
    assert float(x[:, 600:].abs().max()) == 0.0


def test_a_bad_logit_shows():
    for bad in (math.nan, math.inf):
        x, _, targets = problem(2, 300, 1.0, torch.float32)
        x[0, 17] = bad
        assert not bool(kernels.head_losses(x, None, targets, 1.0, 0.0, False, True)[0, 0].isfinite())


# ---------------------------------------------------------------------------------------------------------------------
# head_loss
# ---------------------------------------------------------------------------------------------------------------------


def head_problem(batch, tokens, width, vocabulary, dtype):
    h, weight = 0.3 * randn(batch, tokens, width).to(dtype), randn(vocabulary, width, seed=1).to(dtype)
    teacher = (0.3 * randn(batch, tokens, width, seed=2).to(dtype), randn(vocabulary, width, seed=3).to(dtype))
    ids = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    return h.requires_grad_(), weight.requires_grad_(), ids, teacher


def losses(h, weight, ids, teacher, **options):
    out = head_loss(
        h,
        weight,
        ids,
        teacher_h_BTM=teacher[0],
        teacher_weight_VM=teacher[1],
        ce_weight=0.5,
        kl_weight=1.5,
        agreement=True,
        **options,
    )
    return out, torch.autograd.grad(out.loss, (h, weight))


# Several chunks need more than 256 rows; for one chunk the interpreter is spared most of them.
@pytest.mark.parametrize(("tokens", "limit"), [(161 if CUDA else 21, None), (161, 64 * 300)])
def test_head_loss_through_the_kernel_equals_the_plain_one(monkeypatch, tokens, limit):
    """FP32: both forms round sums of 300 products and probabilities apart, a few hundred times 2^-24 at most."""
    call = head_problem(2, tokens, 24, 300, torch.float32)
    plain, plain_grads = losses(*call)
    monkeypatch.setattr(loss_module, "kernels_for", lambda x: kernels)
    fast, grads = losses(*call, chunk_values=limit)
    for name in ("loss", "ce", "kl"):
        a, b = getattr(fast, name), getattr(plain, name)
        assert abs(float(a) - float(b)) < 300 * 2**-24 * float(b)
    assert float(fast.agreement) == float(plain.agreement)
    for a, b in zip(grads, plain_grads, strict=True):
        assert (a - b).norm() < 300 * 2**-24 * b.norm()


def test_chunks_cover_all_tokens_once_and_are_of_equal_size():
    call = loss_module._Call(torch.zeros(1), None, 1.0, 0.0, 0.0, False, torch.float32, 2000 * 100, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "kernels_for", lambda x: kernels)
        for count in (1, 255, 2000, 2001, 8188, 32760):
            rows = call.rows(torch.empty(count, 1), 100)
            assert torch.cat([torch.arange(count)[r] for r in rows]).tolist() == list(range(count))
            sizes = {r.stop - r.start for r in rows}
            assert len(sizes) == 1
            assert sizes.pop() <= 2000 + 255


@on_gpu
def test_head_loss_in_bf16_is_within_rounding_of_float64():
    """What half-precision logits cost: u = 2^-8 of a logit, which moves a probability by u |x|; and roundings of gradients."""
    h, weight, ids, teacher = head_problem(2, 517, 256, 32003, torch.bfloat16)
    out, grads = losses(h, weight, ids, teacher, chunk_values=2**24)
    exact_h, exact_weight = h.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected, expected_grads = losses(exact_h, exact_weight, ids, tuple(x.double() for x in teacher))
    spread = 2**-8 * float((h @ weight.T).abs().max())
    for name in ("loss", "ce", "kl"):  # means over a thousand tokens: errors of single logits average out
        a, b = getattr(out, name), getattr(expected, name)
        assert abs(float(a) - float(b)) < spread * float(b) / 4
    for a, b in zip(grads, expected_grads, strict=True):
        assert (a.double() - b).norm() < (spread / 2 + 3 * 2**-8) * b.norm()
