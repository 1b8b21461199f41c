"""The kernels of small ops against their plain twins in FP64: outputs and the gradients of every input.

Without a GPU they run in Triton's interpreter in FP32 and FP16 (it truncates to BF16 where hardware rounds), with one in FP32 and
BF16. Tolerance, elementwise: a kernel computes in FP32 and rounds once to its output's dtype, so

    |found - exact| <= u |exact| + (20 + sqrt(terms)) 2^-24 max|exact|       u = 2^-24, 2^-11, 2^-8 in FP32, FP16, BF16

where 20 counts the FP32 operations on the way of a value (rsqrt, exp2 and division cost 2 each) and `terms` the values of its
longest sum. Inputs are rounded to the tested dtype first, so the FP64 reference sees what the kernel sees.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import openling.ops.fused as plain
from openling.ops.kernels import (
    add_rms_norm,
    apply_rope,
    gated_group_norm,
    latent_qkv,
    norm_rope,
    norms,
    rms_norm,
    split_norm_rope,
    swiglu,
    swiglu_packed,
)
from openling.ops.kernels.partial import sum_partials
from openling.ops.norm import rms_norm as plain_rms_norm
from openling.ops.rope import apply_rope as plain_rope
from openling.ops.rope import rope_frequencies, rope_tables

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
EXAMPLES = 4 if CUDA else 6  # every shape is compiled anew on a GPU, and takes a second in the interpreter
EPS = 1e-6

on_gpu = pytest.mark.skipif(not CUDA, reason="real shapes in BF16 need a GPU")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that a kernel fails to write shows up as NaN."""
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)

        def poisoned(*args, _allocate=allocate, **kwargs):
            out = _allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, poisoned)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(DEVICE)


def tables(batch, tokens, rotary, start=3):
    """Tables of positions that differ between the rows of a batch."""
    positions = start + torch.arange(tokens)[None] + 7 * torch.arange(batch)[:, None]
    return tuple(x.to(DEVICE) for x in rope_tables(positions, *rope_frequencies(rotary, 1e4)))


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def assert_rounded_once(found, exact, terms):
    assert found.isfinite().all()
    exact = exact.detach()
    slack = (20 + terms**0.5) * 2**-24 * float(exact.abs().max()) if exact.numel() else 0.0
    assert ((found.detach().double() - exact).abs() <= UNIT[found.dtype] * exact.abs() + slack + 2**-25).all()


def strided_like(x, seed):
    """Random values of x's shape and dtype whose rows do not follow one another in memory."""
    if x.dim() < 3:
        return randn(*x.shape, seed=seed, dtype=x.dtype)
    return randn(x.shape[0], x.shape[2], x.shape[1], *x.shape[3:], seed=seed, dtype=x.dtype).transpose(1, 2)


def check(fast, twin, inputs, terms):
    """Outputs and all gradients of fast(*inputs) against twin(*inputs) in FP64; on a GPU twice, for equal bits."""
    exact_in = [x.detach().double().requires_grad_() for x in inputs]
    exact = as_tuple(twin(*exact_in))
    runs = []
    for _ in range(2 if CUDA else 1):
        found_in = [x.detach().clone().requires_grad_() for x in inputs]
        found = as_tuple(fast(*found_in))
        upstream = [strided_like(x, 100 + i) for i, x in enumerate(found)]
        runs.append((*found, *torch.autograd.grad(found, found_in, upstream)))
    exact_grads = torch.autograd.grad(exact, exact_in, [x.double() for x in upstream])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
    for a, b in zip(runs[0], (*exact, *exact_grads), strict=True):
        assert_rounded_once(a, b, terms)


# ---------------------------------------------------------------------------------------------------------------------
# Split + QK-norm + RoPE
# ---------------------------------------------------------------------------------------------------------------------


def check_split(batch, tokens, heads, kv_heads, dim, rotary, *, norm, silu, dtype=torch.float32, weights=None):
    call = {"heads": heads, "kv_heads": kv_heads, "eps": EPS, "silu": silu}
    turns = tables(batch, tokens, rotary)
    rows = (heads + 2 * kv_heads) * dim
    inputs = [randn(batch, tokens, rows + 8, dtype=dtype)]
    if norm:
        inputs += [1 + randn(dim, seed=i, dtype=weights or dtype) for i in (1, 2)]
    check(
        lambda x, *w: split_norm_rope(x[..., :rows], w or None, turns, heads, kv_heads, EPS, silu),
        lambda x, *w: plain.split_norm_rope(x[..., :rows], w or None, turns, **call),
        inputs,
        batch * tokens * heads,
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 3),
    heads=st.sampled_from([(4, 4), (6, 2), (3, 1), (17, 17)]),
    dim=st.sampled_from([(64, 32), (128, 64), (128, 128), (64, 0), (48, 24), (80, 20), (96, 96)]),
    norm=st.booleans(),
    silu=st.booleans(),
)
def test_split_norm_rope(batch, tokens, heads, dim, norm, silu):
    check_split(batch, tokens, *heads, *dim, norm=norm, silu=silu)


@pytest.mark.parametrize("weights", [HALF, torch.float32])
def test_split_norm_rope_rounds_once(weights):
    check_split(2, 7, 4, 4, 64, 32, norm=True, silu=False, dtype=HALF, weights=weights)


def test_split_norm_rope_with_one_table_for_the_batch_and_an_unused_output():
    x = randn(2, 5, 3 * 2 * 64).requires_grad_()
    weights, turns = (randn(64, seed=1), randn(64, seed=2)), tables(1, 5, 32)
    q, k, v = split_norm_rope(x, weights, turns, 2, 2, EPS, False)
    (found,) = torch.autograd.grad(k.sum(), x)  # gradients of q and v are zeros, that of k is an expanded scalar
    exact_x = x.detach().double().requires_grad_()
    exact = plain.split_norm_rope(exact_x, tuple(w.double() for w in weights), turns, heads=2, kv_heads=2, eps=EPS)
    (expected,) = torch.autograd.grad(exact[1].sum(), exact_x)
    assert_rounded_once(found, expected, 64)
    assert v.data_ptr() == x[..., 2 * 2 * 64 :].data_ptr()


@on_gpu
@pytest.mark.parametrize("shape", [(2, 4099, 16, 16, 128, 64), (2, 1021, 32, 8, 128, 128), (1, 1021, 64, 64, 128, 64)])
@pytest.mark.parametrize("silu", [False, True])
def test_split_norm_rope_in_bf16(shape, silu):
    check_split(*shape, norm=True, silu=silu, dtype=HALF)


# ---------------------------------------------------------------------------------------------------------------------
# Norms
# ---------------------------------------------------------------------------------------------------------------------


def check_norm(shape, *, dtype=torch.float32, weights=None):
    width = shape[-1]
    check(
        lambda x, w: rms_norm(x[..., 8 : 8 + width], w, EPS, dtype),
        lambda x, w: plain_rms_norm(x[..., 8 : 8 + width], w, EPS),
        [randn(*shape[:-1], width + 16, dtype=dtype), 1 + randn(width, seed=1, dtype=weights or dtype)],
        max(width, torch.Size(shape[:-1]).numel()),
    )


@pytest.mark.parametrize("shape", [(3, 7, 100), (1, 1, 64), (60, 256), (2, 3, 1536)])
def test_rms_norm_of_a_slice(shape):
    check_norm(shape)


@pytest.mark.parametrize("weights", [HALF, torch.float32])
def test_rms_norm_rounds_once(weights):
    check_norm((2, 9, 512), dtype=HALF, weights=weights)


@on_gpu
@pytest.mark.parametrize("width", [512, 1536, 2048, 4096, 8192])
def test_rms_norm_in_bf16(width):
    check_norm((3, 1111, width), dtype=HALF)


def check_add(shape, stream, dtype):
    """A stream of dtype `stream`, updates and normed values of `dtype`. The norm is that of the stream as it was rounded."""
    inputs = [randn(*shape, dtype=stream), randn(*shape, seed=1, dtype=dtype), 1 + randn(shape[-1], seed=2, dtype=dtype)]
    found_in = [x.clone().requires_grad_() for x in inputs]
    h, y = add_rms_norm(*found_in, EPS, dtype)
    assert (h.dtype, y.dtype) == (stream, dtype)
    assert_rounded_once(h, inputs[0].double() + inputs[1].double(), 1)
    exact_h, exact_w = h.detach().double().requires_grad_(), inputs[2].double().requires_grad_()
    exact_y = plain_rms_norm(exact_h, exact_w, EPS)
    assert_rounded_once(y, exact_y, shape[-1])
    upstream = [strided_like(h, 3), strided_like(y, 4)]
    dh, ddelta, dw = torch.autograd.grad((h, y), found_in, upstream)
    assert (dh.dtype, ddelta.dtype) == (stream, dtype)
    exact_dh, exact_dw = torch.autograd.grad(exact_y, (exact_h, exact_w), upstream[1].double())
    for found, exact in ((dh, exact_dh + upstream[0].double()), (ddelta, exact_dh + upstream[0].double()), (dw, exact_dw)):
        assert_rounded_once(found, exact, max(shape[-1], torch.Size(shape[:-1]).numel()))


@pytest.mark.parametrize(("stream", "dtype"), [(torch.float32, torch.float32), (HALF, HALF), (torch.float32, HALF)])
@pytest.mark.parametrize("shape", [(2, 9, 100), (3, 5, 256)])
def test_add_rms_norm(shape, stream, dtype):
    check_add(shape, stream, dtype)


@on_gpu
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2048, 4096, 8192])
def test_add_rms_norm_in_bf16(width, stream):
    check_add((3, 1111, width), stream, HALF)


def test_an_unused_output_of_add_rms_norm_has_a_zero_gradient():
    h, delta, weight = randn(2, 3, 64).requires_grad_(), randn(2, 3, 64, seed=1), 1 + randn(64, seed=2)
    (found,) = torch.autograd.grad(add_rms_norm(h, delta, weight, EPS, torch.float32)[1].sum(), h)
    exact_h = h.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(plain_rms_norm(exact_h + delta.double(), weight.double(), EPS).sum(), exact_h)
    assert_rounded_once(found, exact, 64)


def check_gated(shape, groups, *, dtype=torch.float32, weights=None):
    width = shape[-1]
    inputs = [randn(*shape, dtype=dtype), randn(*shape[:-1], 2 * width, seed=1, dtype=dtype)]
    check(
        lambda x, g, w: gated_group_norm(x, g[..., width:], w, EPS, groups),
        lambda x, g, w: plain.gated_group_norm(x, g[..., width:], w, EPS, groups),
        [*inputs, 1 + randn(width, seed=2, dtype=weights or dtype)],
        max(width // groups, torch.Size(shape[:-1]).numel()),
    )


@pytest.mark.parametrize(("shape", "groups"), [((2, 9, 120), 3), ((1, 5, 256), 4), ((2, 20, 64), 1), ((1, 3, 2048), 2)])
def test_gated_group_norm(shape, groups):
    check_gated(shape, groups)


@pytest.mark.parametrize("weights", [HALF, torch.float32])
def test_gated_group_norm_rounds_once(weights):
    check_gated((2, 9, 512), 4, dtype=HALF, weights=weights)


@on_gpu
@pytest.mark.parametrize(("width", "groups"), [(2048, 4), (4096, 4), (8192, 8), (2048, 1)])
def test_gated_group_norm_in_bf16(width, groups):
    check_gated((3, 1111, width), groups, dtype=HALF)


# ---------------------------------------------------------------------------------------------------------------------
# Weight gradients
# ---------------------------------------------------------------------------------------------------------------------


def test_programs_that_walk_over_many_rows(monkeypatch):
    """On one processor a program has several blocks of rows, as long launches do; elsewhere in this file it has one."""
    for module in (norms, norm_rope):
        monkeypatch.setattr(module, "PROCESSORS", 1)
    check_norm((5, 13, 256))
    check_gated((5, 13, 512), 2)
    check_split(1, 5, 17, 17, 64, 32, norm=True, silu=False)
    check_split(2, 4, 3, 1, 48, 24, norm=True, silu=True)


@pytest.mark.parametrize("border", [None, 300, 0])
def test_partial_sums(border):
    partial = randn(700, 40)
    found = sum_partials(partial, torch.float32, border)
    exact = partial.double()
    exact = exact.sum(0) if border is None else torch.stack((exact[:border].sum(0), exact[border:].sum(0)))
    assert_rounded_once(found, exact, 700)


# ---------------------------------------------------------------------------------------------------------------------
# Rotation, MLA
# ---------------------------------------------------------------------------------------------------------------------


def check_rope(batch, tokens, heads, dim, rotary, interleaved, dtype=torch.float32):
    turns = tables(batch, tokens, rotary)
    check(
        lambda x: apply_rope(x[..., :dim], *turns, interleaved),
        lambda x: plain_rope(x[..., :dim], *turns, interleaved=interleaved),
        [randn(batch, tokens, heads, dim + 8, dtype=dtype)],
        1,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (128, 64), (48, 20), (40, 0)])
def test_rope(dim, rotary, interleaved):
    check_rope(2, 3, 3, dim, rotary, interleaved)


def test_rope_rounds_once():
    check_rope(2, 9, 1, 64, 64, True, HALF)


def check_latent(batch, tokens, cached, heads, nope, rotary, value, dtype=torch.float32):
    turns = tables(batch, tokens, rotary)
    inputs = [
        randn(batch, tokens, heads, nope + rotary, dtype=dtype),
        randn(batch, cached, heads, nope + value, seed=1, dtype=dtype),
        randn(batch, cached, rotary + 32, seed=2, dtype=dtype),
    ]
    check(
        lambda q, kv, shared: latent_qkv(q, kv, shared[..., 32:], turns),
        lambda q, kv, shared: plain.latent_qkv(q, kv, shared[..., 32:], turns),
        inputs,
        heads,
    )


@pytest.mark.parametrize(
    ("tokens", "cached", "heads", "nope", "rotary", "value"),
    [(3, 3, 3, 128, 64, 128), (2, 5, 17, 32, 16, 64), (1, 4, 2, 48, 20, 36)],
)
def test_latent_qkv(tokens, cached, heads, nope, rotary, value):
    check_latent(2, tokens, cached, heads, nope, rotary, value)


def test_latent_qkv_rounds_once():
    check_latent(1, 3, 3, 20, 128, 64, 128, HALF)


@on_gpu
def test_latent_qkv_in_bf16():
    check_latent(2, 1021, 1021, 64, 128, 64, 128, HALF)


# ---------------------------------------------------------------------------------------------------------------------
# SwiGLU
# ---------------------------------------------------------------------------------------------------------------------


def check_swiglu(rows, width, dtype=torch.float32):
    packed = randn(rows, 2 * width, dtype=dtype)
    check(swiglu_packed, plain.swiglu_packed, [packed], 1)
    strided = [randn(1, rows, width + 8, seed=i, dtype=dtype) for i in (1, 2)]
    check(
        lambda gate, up: swiglu(gate[..., :width], up[..., 8:]),
        lambda gate, up: plain.swiglu(gate[..., :width], up[..., 8:]),
        strided,
        1,
    )


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 70), (33, 1100), (0, 64)])
def test_swiglu(rows, width):
    check_swiglu(rows, width)


def test_swiglu_rounds_once():
    check_swiglu(40, 96, HALF)


@on_gpu
@pytest.mark.parametrize("width", [512, 2048, 5632])
def test_swiglu_in_bf16(width):
    check_swiglu(4099, width, HALF)
