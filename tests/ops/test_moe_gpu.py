"""The experts' kernels in BF16 at real shapes, on a GPU: against the twin in FP64, form against form, run against run."""

import itertools

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from moe_layers import block_fp8, choices, layer, options, randn, rows_fp8, summed, through_fp8, weights_of

from openling.ops.kernels import moe_decode, moe_fp8, moe_ops, moe_sort
from openling.ops.kernels.moe_route import RouteSpec
from openling.ops.moe import dequantize_blocks
from openling.ops.moe import route as route_twin


def off(found, expected):
    """Root mean square of the error relative to that of the values."""
    return ((found.double() - expected).pow(2).mean() / expected.pow(2).mean()).sqrt().item()


def test_router_equals_the_twin_in_fp32():
    """Logits: products are exact, but Hopper adds 16 at a time to an FP32 accumulator and cuts off what does not fit, towards 0:
    up to 2^-23 of the running sum for the result, and 17 addends at 2^-25 of the largest. Of three terms, smallest first, only
    the last makes the sums large: 128 additions, at most 128 * 5.25 * 2^-23 of the largest sum. In the mean a cut is half of
    2^-23, always against the sum, which is smaller before the end: below 128 * 2^-24. Sums that round, as in FP32 units, would be
    off by sqrt(2048) 2^-24 / sqrt(3), a fifth of that.

    Weights: sigmoid's slope is at most 1/4 and 2.5 / total is around 0.4: a tenth of the logits' largest error, below 1e-5.

    Choices may differ only where biased scores are that close. The tokens' gradient is rounded in dlogits, router and result; the
    router's comes from two BF16 terms, 2^-17. What counts as a rounding: `test_layer_equals_the_twin`.
    """
    spec = RouteSpec(8, 8, 4, "sigmoid", True, 2.5)
    x, router, bias = layer(5000, 2048, 8, 256, dtype=torch.bfloat16)[:3]
    x.requires_grad_()
    router.requires_grad_()
    weight, index, logits = moe_ops.route(x, router, bias, *spec)
    x64, router64 = x.detach().double().requires_grad_(), router.detach().double().requires_grad_()
    true = (x64 @ router64.T).detach()
    assert (logits.double() - true).abs().max() < 128 * 5.25 * 2**-23 * true.abs().max()
    assert off(logits.detach(), true) < 128 * 2**-24
    expected, chosen = route_twin(x64, router64, bias.double(), **options(spec))
    same = (index.sort().values == chosen.sort().values).all(-1)
    assert same.double().mean() > 0.999
    weight64 = weights_of(x64, router64, index, spec)
    assert (weight.double() - weight64).abs().max() < 1e-5
    dweight = randn(5000, 8)
    found = torch.autograd.grad(weight, (x, router), dweight)
    true = torch.autograd.grad(weight64, (x64, router64), dweight.double())
    assert off(found[0], true[0]) < 3**0.5 * 2**-9
    assert off(found[1], true[1]) < 1e-5


@pytest.mark.parametrize("form", ["hopper", "portable"])
@pytest.mark.parametrize("tokens", [1, 333, 4096])
def test_layer_equals_the_twin(form, tokens, monkeypatch):
    """A rounding to BF16 is off by up to 2^-8 of a power of two, evenly: 2^-8 / sqrt(3) in the mean square, of values around 1.5
    times a power of two. That is less than u = 2^-9, and independent roundings add up in squares.

    The error of n values is known to 1 / sqrt(2 n) of itself: three of these are granted where a single token has 8 of them.

    Roundings on the way: out a, y, out (3); dx adds h, p, dh, the rows, dlogits, the router's weight (9); gate and up h, p, dh,
    the gradient (5, and a in the router's share); down h, w a, the gradient (4); the router's weight h, p and, in FP32, a (4).
    """
    for name in moe_ops.FORMS:
        monkeypatch.setitem(moe_ops.FORMS, name, form)
    spec = RouteSpec(8, 8, 4, "sigmoid", True, 2.5)
    x, router, bias, *weights = layer(tokens, 2048, 512, 256, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, router, *weights)]
    out, _ = moe_ops.mixture(x, router, bias, *weights, *spec)
    dout = randn(tokens, 2048, seed=7, dtype=torch.bfloat16)
    grads = torch.autograd.grad(out, leaves, dout)
    index = moe_ops.route(x, router, bias, *spec)[1]
    x64, router64 = x.detach().double().requires_grad_(), router.detach().double().requires_grad_()
    weight64 = weights_of(x64, router64, index, spec)
    expected = torch.zeros_like(x64)
    u = 2**-9
    dx, drouter = torch.zeros_like(x64), torch.zeros_like(router64)
    total = torch.zeros_like(x64)
    squares = [[0.0, 0.0] for _ in range(3)]
    for e in range(256):  # expert by expert, so that FP64 copies of all weights are never needed at once
        n, j = (index == e).nonzero(as_tuple=True)
        mine = [w[e].detach().double().requires_grad_() for w in weights]
        y = F.linear(F.silu(F.linear(x64[n], mine[0])) * F.linear(x64[n], mine[1]), mine[2]) * weight64[n, j, None]
        total = total.index_add(0, n, y.detach())
        if n.numel():
            gx, gr, *gw = torch.autograd.grad(y, [x64, router64, *mine], dout[n].double(), retain_graph=True)
            dx, drouter = dx + gx, drouter + gr
        else:
            gw = [torch.zeros_like(m) for m in mine]
        for square, found, true in zip(squares, grads[2:], gw, strict=True):
            square[0] += (found[e].double() - true).pow(2).sum().item()
            square[1] += true.pow(2).sum().item()
    expected = total
    assert off(out, expected) < 3**0.5 * u
    assert off(grads[0], dx) < 9**0.5 * u
    assert off(grads[1], drouter) < 4**0.5 * u * (1 + 3 / (2 * tokens * 8) ** 0.5)
    for name, roundings, (error, size) in zip(("gate", "up", "down"), (5, 5, 4), squares, strict=True):
        assert (error / size) ** 0.5 < roundings**0.5 * u, name


def test_forms_agree_with_each_other_to_a_rounding(monkeypatch):
    """The same FP32 sums in another order: after rounding, neighbouring BF16 numbers here and there.

    Hopper's d_act rounds p, and then dh as the portable one does: dh, dw and the gradients of gate and up differ by three
    roundings, and by two more where the result, like dx, is rounded once in each form.
    """
    x, _, _, gate, up, down = layer(1000, 512, 256, 16, dtype=torch.bfloat16)
    weight, dout = randn(1000, 4, seed=5).abs(), randn(1000, 512, seed=6, dtype=torch.bfloat16)
    s = moe_sort.sort_tokens(choices(1000, 4, 16, "skewed"), 16)
    rows = int(s.start_E[-1])
    results = {}
    for form, dtype in itertools.product(("hopper", "portable"), (torch.bfloat16, torch.float32)):
        for name in moe_ops.FORMS:
            monkeypatch.setitem(moe_ops.FORMS, name, form)
        run = {name: moe_ops.product(name, x, 256) for name in moe_ops.FORMS if name != "router"}
        act, h = run["gate_up"](x, s, gate, up, keep=True)
        dh, weighted, parts = run["d_act"](dout, weight, s, down, h)
        outs = [act[:rows], h[:rows], run["down"](act, s, down)[:rows], dh[:rows], weighted[:rows], parts.sum(0)[:rows]]
        outs += [run["d_x"](dh, s, gate, up)[:rows], run["d_down"](dout, weighted, s, dtype), *run["d_gate_up"](dh, x, s, dtype)]
        results[form, dtype] = outs
    for dtype in (torch.bfloat16, torch.float32):
        for i, (a, b) in enumerate(zip(results["hopper", dtype], results["portable", dtype], strict=True)):
            results_rounded = i == 6 or (i in (8, 9) and dtype == torch.bfloat16)
            roundings = 5 if results_rounded else 3 if i in (3, 5, 8, 9) else 1
            assert off(a, b.double()) < roundings**0.5 * 2**-9, i


def test_runs_are_bitwise_equal_and_can_be_captured():
    spec = RouteSpec(8, 8, 4, "sigmoid", True, 2.5)
    x, router, bias, *weights = layer(1500, 1024, 512, 64, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, router, *weights)]

    def run():
        out, counts = moe_ops.mixture(x, router, bias, *weights, *spec)
        return [out, counts, *torch.autograd.grad(out, leaves, x.detach())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's nodes of the leaves belong to the stream that makes them: not to the legacy one
        first, second = run(), run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    for again in (second, captured):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("tokens", [1, 8, 32])
def test_few_tokens(tokens):
    """Roundings: a and out."""
    spec = RouteSpec(8, 8, 4, "sigmoid", True, 2.5)
    x, router, bias, *weights = layer(tokens, 2048, 512, 256, dtype=torch.bfloat16)
    listed = moe_decode.route_few(x, router, bias, spec)
    out = moe_decode.experts_few(x, listed, *weights)
    x64 = x.double()
    weight = weights_of(x64, router.double(), listed.index_Nk, spec)
    expected = summed(x64, weight, listed.index_Nk, *(w.double() for w in weights))
    assert off(out, expected) < 2**0.5 * 2**-9
    alone = moe_decode.experts_few(x[:1], moe_decode.route_few(x[:1], router, bias, spec), *weights)
    assert torch.equal(alone, out[:1])


def test_fp32_parameters_get_fp32_gradients():
    x, router, bias, *weights = layer(300, 512, 256, 16, dtype=torch.bfloat16)
    masters = [w.float().requires_grad_() for w in weights]
    halves = [w.requires_grad_() for w in weights]
    spec = RouteSpec(4, 1, 1, "sigmoid", True, 1.0)
    wide, half = (torch.autograd.grad(moe_ops.mixture(x, router, bias, *w, *spec)[0], w, x) for w in (masters, halves))
    for a, b in zip(wide, half, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a.bfloat16(), b)


def test_deterministic_mode_gives_a_token_the_same_result_in_any_batch():
    spec = RouteSpec(8, 8, 4, "sigmoid", True, 2.5)
    x, router, bias, *weights = layer(4000, 1024, 512, 64, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            whole, _ = moe_ops.mixture(x, router, bias, *weights, *spec)
            for tokens in (1, 7, 130):
                assert torch.equal(moe_ops.mixture(x[:tokens], router, bias, *weights, *spec)[0], whole[:tokens])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tokens", [8, 3000])
def test_block_fp8(tokens):
    """Few tokens: the dequantised weights' result, with roundings of a and out.

    Many: x and a are rounded to e4m3 as well. What that costs, the twin says when it rounds the same way; which of two neighbours
    a value becomes may differ after a, y and out are rounded to BF16, the size of the error does not. The tensor cores keep 14
    bits of an e4m3 sum (DeepSeek-V3, arXiv 2412.19437, 3.3.2): 32 products and the sum so far are aligned to the largest of
    them and cut. Over 128 unit products, whose sum has a deviation of sqrt(128) and stays below 64, these are 132 cuts, evenly
    between 0 and 2^-13 of at most 32: sqrt(132 / 3 / 128) 32 2^-13 = 2.3e-3 of g, u and y each. g counts E[silu'^2] / E[silu^2] =
    1.07 times for unit normal g.
    """
    spec = RouteSpec(8, 8, 4, "sigmoid", True, 2.5)
    x, router, bias, *weights = layer(tokens, 1024, 512, 64, dtype=torch.bfloat16)
    pairs = [block_fp8(w) for w in weights]
    wide = [dequantize_blocks(*pair, torch.float64) for pair in pairs]
    weight, index, _ = moe_ops.route(x, router, bias, *spec)
    out = moe_fp8.block_fp8_experts(x, weight, index, *(p[0] for p in pairs), *(p[1] for p in pairs))
    expected = summed(x.double(), weight.double(), index, *wide)
    if tokens <= moe_decode.MOST_TOKENS:
        assert off(out, expected) < 2**0.5 * 2**-9
    else:
        rounding = off(summed(x.double(), weight.double(), index, *wide, through_fp8), expected)
        assert 0.03 < rounding < 0.06
        assert off(out, expected) < (rounding**2 + 3 * 2**-18 + 3.07 * 2.3e-3**2) ** 0.5


def test_rows_are_quantised_to_the_nearest():
    x = randn(300, 1024, dtype=torch.bfloat16)
    values, scales = moe_fp8.quantize_rows(x)
    nearest, expected = rows_fp8(x)
    assert torch.allclose(scales, expected, rtol=2**-22, atol=0)
    # Numbers half way between two of e4m3 may go either way, because the division may be off by an FP32 rounding.
    assert (values.float() != nearest.float()).double().mean() < 1e-4
