"""The experts' kernels in FP32 against their twins in FP64, small: in Triton's interpreter without a GPU. BF16: test_moe_gpu.py.

FP32 tolerances: a sum of K products is off by at most K 2^-24 of the sum of magnitudes, and rarely by more than sqrt(K) 2^-24;
with K <= 64 and a chain of four products 2e-6 of the largest value covers it tenfold.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from moe_layers import DEVICE, block_fp8, choices, layer, options, randn, rows_fp8, summed, weights_of, worst  # noqa: E402

from openling.ops.kernels import moe_decode, moe_fp8, moe_gemm, moe_ops, moe_sort  # noqa: E402
from openling.ops.kernels.moe_route import (  # noqa: E402
    RouteSpec,
    choose,
    route_dlogits,
    route_dweight,
    route_logits,
    split_terms,
    weight_terms,
)
from openling.ops.kernels.moe_swiglu import swiglu_backward  # noqa: E402
from openling.ops.moe import dequantize_blocks  # noqa: E402
from openling.ops.moe import route as route_twin  # noqa: E402

FP32 = 2e-6
SPEC = RouteSpec(3, 2, 1, "sigmoid", True, 2.5)
# The kernels compile for every dtype and option: on a GPU the BF16 tests cover the same code, and these would only take time.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="test_moe_gpu.py tests these kernels in BF16")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name in moe_gemm.TILES:
        monkeypatch.setitem(moe_gemm.TILES, name, moe_gemm.Tile(128, 32, 32, 4, 2))


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody wrote is NaN, and 3 where it holds integers (a wild index would end the process)."""

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 3)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


# ---------------------------------------------------------------------------------------------------------------------
# Router
# ---------------------------------------------------------------------------------------------------------------------


def routed(x, router, bias, spec):
    logits = route_logits(x, weight_terms(router, x.dtype))
    return logits, *choose(logits, bias, spec)


@interpreted
@pytest.mark.parametrize(
    ("tokens", "model", "experts", "spec", "biased"),
    [
        (37, 40, 16, RouteSpec(4, 4, 2, "sigmoid", True, 2.5), True),
        (19, 24, 12, RouteSpec(3, 3, 2, "softmax", True, 2.5), True),
        (5, 33, 6, RouteSpec(1, 1, 1, "sigmoid", True, 1.0), False),
        (21, 16, 256, RouteSpec(8, 8, 4, "sigmoid", True, 2.5), True),
        (9, 16, 10, RouteSpec(4, 2, 1, "softmax", False, 1.5), False),
    ],
)
def test_router_and_its_gradients_equal_the_twin(tokens, model, experts, spec, biased, poisoned):
    x, router, bias = layer(tokens, model, 4, experts)[:3]
    bias = bias if biased else None
    logits, weight, index = routed(x, router, bias, spec)
    x64, router64 = x.double().requires_grad_(), router.double().requires_grad_()
    expected, chosen = route_twin(x64, router64, None if bias is None else bias.double(), **options(spec))
    order, other = index.sort().indices, chosen.sort().indices
    assert torch.equal(index.gather(1, order), chosen.gather(1, other))
    assert worst(weight.gather(1, order), expected.gather(1, other)) < FP32
    dweight = randn(tokens, spec.top_k, seed=9)
    expected.backward(torch.zeros_like(expected).scatter(1, other, dweight.gather(1, order).double()))
    dlogits = route_dlogits(dweight, logits, index, spec, x.dtype)
    assert worst(route_dweight(dlogits, x, x.dtype), router64.grad) < FP32
    assert worst(dlogits.sum(0) @ router, x64.grad) < FP32


def test_experts_come_in_descending_order_and_ties_go_to_the_lowest_number():
    scores = torch.tensor([[0.0, 2.0, 2.0, 1.0, -1.0, 2.0, 0.0, 0.0], [0.5] * 8], device=DEVICE)
    _, index = choose(scores, None, RouteSpec(5, 1, 1, "sigmoid", True, 1.0))
    assert index.tolist() == [[1, 2, 5, 3, 0], [0, 1, 2, 3, 4]]
    _, index = choose(scores, None, RouteSpec(3, 4, 2, "sigmoid", True, 1.0))
    assert index.tolist() == [[1, 2, 3], [0, 1, 2]]  # groups (0, 2) (2, 1) (-1, 2) (0, 0); of equal ones the first two


def test_bias_moves_the_choice_alone_and_losing_groups_never_win():
    x, router, _ = layer(20, 16, 4, 8)[:3]
    bias = torch.full((8,), -5.0, device=DEVICE)
    bias[4:] -= 1.0
    logits, weight, index = routed(x, router, bias, RouteSpec(3, 2, 1, "sigmoid", False, 1.0))
    assert (index < 4).all()
    assert worst(weight, logits.sigmoid().gather(1, index)) < FP32


def test_infinite_bias_and_nan_scores():
    logits = torch.zeros(2, 8, device=DEVICE)
    logits[1, 2] = float("nan")
    bias = torch.zeros(8, device=DEVICE)
    bias[:3] = torch.tensor([float("-inf"), float("inf"), 0.5])
    _, index = choose(logits, bias, RouteSpec(8, 1, 1, "sigmoid", True, 1.0))
    # Minus infinity and NaN come last, each expert once.
    assert index.tolist() == [[1, 2, 3, 4, 5, 6, 7, 0], [1, 3, 4, 5, 6, 7, 0, 2]]


def test_three_bf16_terms_are_the_fp32_weight():
    weight = randn(7, 50) * torch.logspace(-10, 3, 50, device=DEVICE)
    terms = split_terms(weight, 3, torch.bfloat16)
    assert ((terms.double().sum(0) - weight.double()) / weight.double()).abs().max() <= 2**-25


# ---------------------------------------------------------------------------------------------------------------------
# Sorting
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "kind"),
    [(1, 1, 1, "even"), (5, 2, 3, "even"), (700, 2, 5, "skewed"), (300, 8, 16, "even"), (0, 2, 4, "even"), (900, 1, 4, "one")],
)
def test_sorted_rows_are_the_stable_order_in_segments(tokens, top_k, experts, kind, poisoned):
    index = choices(tokens, top_k, experts, kind)
    s = moe_sort.sort_tokens(index, experts)
    flat = index.flatten()
    counts = torch.zeros(experts, dtype=torch.int64, device=DEVICE).scatter_add_(0, flat, torch.ones_like(flat))
    units = (counts + moe_sort.UNIT - 1) // moe_sort.UNIT
    start = F.pad((units * moe_sort.UNIT).cumsum(0), (1, 0))
    order = flat.argsort(stable=True)
    rank = torch.arange(flat.numel(), device=DEVICE) - F.pad(counts.cumsum(0), (1, 0))[flat[order]]
    row = torch.empty_like(flat).scatter_(0, order, start[flat[order]] + rank)
    entry = torch.full((int(start[-1]),), -1, device=DEVICE).scatter_(0, row, torch.arange(flat.numel(), device=DEVICE))
    assert torch.equal(s.counts_E.long(), counts) and torch.equal(s.start_E.long(), start)
    assert torch.equal(s.row_P.long(), row)
    assert int(start[-1]) <= s.entry_R.numel() and torch.equal(s.entry_R[: int(start[-1])].long(), entry)
    tiles = [
        [e, int(start[e]) + i * moe_sort.UNIT, min(2, int(units[e]) - i)]
        for e in range(experts)
        for i in range(0, int(units[e]), 2)
    ]
    assert int(s.tiles[0, 0]) == len(tiles) <= s.max_tiles
    assert s.tiles[1 : 1 + len(tiles), :3].tolist() == tiles


# ---------------------------------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------------------------------

LOADS = {
    "a few tokens, empty experts": (3, 33, 16, 8, SPEC),
    "several tiles": (150, 48, 32, 4, RouteSpec(2, 1, 1, "sigmoid", True, 2.5)),
    "softmax": (70, 24, 48, 6, RouteSpec(2, 1, 1, "softmax", False, 1.0)),
    "one expert takes everything": (140, 16, 16, 4, RouteSpec(1, 1, 1, "sigmoid", True, 1.0)),
}


@interpreted
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("form", ["mixture", "route and experts"])
def test_layer_and_all_gradients_equal_the_twin(load, form, poisoned):
    tokens, model, width, experts, spec = LOADS[load]
    x, router, bias, *weights = layer(tokens, model, width, experts)
    if load.startswith("one"):
        bias[2] = 100.0
    leaves = [t.requires_grad_() for t in (x, router, *weights)]
    if form == "mixture":
        out, counts = moe_ops.mixture(x, router, bias, *weights, *spec)
        index = moe_ops.route(x, router, bias, *spec)[1]
        assert torch.equal(counts.cpu(), index.flatten().cpu().bincount(minlength=experts).int())
    else:
        weight, index, _ = moe_ops.route(x, router, bias, *spec)
        out = moe_ops.experts(x, weight, index, *weights)
    dout = randn(tokens, model, seed=7)
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    copies = [t.detach().double().requires_grad_() for t in leaves]
    expected = summed(copies[0], weights_of(copies[0], copies[1], index, spec), index, *copies[2:])
    grads = torch.autograd.grad(expected, copies, dout.double())
    for a, b in zip(found, [expected, *grads], strict=True):
        assert worst(a, b) < FP32


@interpreted
def test_what_needs_no_gradient_gets_none():
    x, router, bias, *weights = layer(20)
    x.requires_grad_()
    out, _ = moe_ops.mixture(x, router, bias, *weights, *SPEC)
    (dx,) = torch.autograd.grad(out.sum(), (x,))
    full = [t.clone().requires_grad_() for t in (x.detach(), router, *weights)]
    out, _ = moe_ops.mixture(full[0], full[1], bias, *full[2:], *SPEC)
    assert torch.equal(dx, torch.autograd.grad(out.sum(), full)[0])


@interpreted
def test_runs_are_bitwise_equal():
    x, router, bias, *weights = layer(70)
    runs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, router, *weights)]
        out, _ = moe_ops.mixture(leaves[0], leaves[1], bias, *leaves[2:], *SPEC)
        runs.append([out, *torch.autograd.grad(out, leaves, x)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@interpreted
def test_a_checkpointed_layer_gives_equal_bits():
    """Its backward may read what forward saved only once."""
    x, router, bias, *weights = layer(4)
    runs = []
    for call in (lambda f, *a: f(*a), partial(checkpoint, use_reentrant=False)):
        leaves = [t.clone().requires_grad_() for t in (x, router, *weights)]
        out, _ = call(moe_ops.mixture, leaves[0], leaves[1], bias, *leaves[2:], *SPEC)
        out.backward(x)
        runs.append([out, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@interpreted
def test_ops_are_registered_as_pytorch_asks():
    x, router, bias, *weights = layer(4)
    weight, index, logits = moe_ops.route(x, router, bias, *SPEC)
    leaves = [t.requires_grad_() for t in (x, router, *weights)]
    torch.library.opcheck(moe_ops.route, (x, router, bias, *SPEC))
    # Without the comparison of outputs: the ends of the tables are not written.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (x, weight, index, *weights, router, logits, *SPEC[3:], True)
    torch.library.opcheck(moe_ops.moe_experts, arguments, test_utils=tests)
    torch.library.opcheck(moe_ops.moe_few, (x.detach(), router.detach(), bias, *(w.detach() for w in weights), *SPEC))
    assert all(leaf.requires_grad for leaf in leaves)


@interpreted
def test_the_layer_compiles_to_one_graph_and_equal_bits():
    x, router, bias, *weights = layer(33)
    leaves = [t.requires_grad_() for t in (x, router, *weights)]

    def call(x, router, *weights):
        out, counts = moe_ops.mixture(x, router, bias, *weights, *SPEC)
        return out * 2, counts

    results = []
    for form in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        out, counts = form(*leaves)
        results.append([out, counts, *torch.autograd.grad(out, leaves, x.detach())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# A few tokens
# ---------------------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("tokens", "model", "width", "experts", "spec"),
    [
        (1, 48, 32, 8, SPEC),
        (5, 40, 24, 8, RouteSpec(2, 4, 2, "softmax", True, 2.5)),
        (32, 33, 16, 6, RouteSpec(2, 1, 1, "sigmoid", True, 1.0)),
    ],
)
def test_few_tokens_equal_the_twin_whatever_the_batch(tokens, model, width, experts, spec, poisoned):
    x, router, bias, *weights = layer(tokens, model, width, experts)
    listed = moe_decode.route_few(x, router, bias, spec)
    out = moe_decode.experts_few(x, listed, *weights)
    x64, router64 = x.double(), router.double()
    chosen = route_twin(x64, router64, bias.double(), **options(spec))[1]
    assert torch.equal(listed.index_Nk.sort().values, chosen.sort().values)
    expected = summed(x64, weights_of(x64, router64, listed.index_Nk, spec), listed.index_Nk, *(w.double() for w in weights))
    assert worst(out, expected) < FP32
    lines = listed.plan[1 : 1 + int(listed.plan[0, 0])].tolist()
    found = {line[0]: sorted(line[2 : 2 + line[1]]) for line in lines}
    flat = listed.index_Nk.flatten().tolist()
    assert found == {e: [p for p, other in enumerate(flat) if other == e] for e in set(flat)}
    given = moe_decode.list_few(listed.weight_Nk, listed.index_Nk, experts)
    assert torch.equal(moe_decode.experts_few(x, given, *weights), out)
    for n in range(0, tokens, 3):
        alone = x[n : n + 1]
        assert torch.equal(
            moe_decode.experts_few(alone, moe_decode.route_few(alone, router, bias, spec), *weights), out[n : n + 1]
        )


@interpreted
def test_few_tokens_without_gradients_take_the_stream(monkeypatch):
    x, router, bias, *weights = layer(4)
    with torch.no_grad():
        out, counts = moe_ops.mixture(x, router, bias, *weights, *SPEC)
        assert counts is None
        torch.use_deterministic_algorithms(True)
        try:
            rows, counts = moe_ops.mixture(x, router, bias, *weights, *SPEC)
        finally:
            torch.use_deterministic_algorithms(False)
    assert counts is not None
    assert worst(out, rows) < FP32


# ---------------------------------------------------------------------------------------------------------------------
# Block FP8
# ---------------------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("tokens", [5, 70])
def test_block_fp8_products_are_those_of_the_dequantised_numbers(tokens, poisoned):
    x, router, bias, *weights = layer(tokens, 256, 128, 4)
    pairs = [block_fp8(w) for w in weights]
    wide = [dequantize_blocks(*pair, torch.float64) for pair in pairs]
    weight, index, _ = moe_ops.route(x, router, bias, *SPEC)
    values, scales = [p[0] for p in pairs], tuple(p[1] for p in pairs)
    if tokens <= moe_decode.MOST_TOKENS:
        found = moe_fp8.block_fp8_experts(x, weight, index, *values, *scales)
        assert worst(found, summed(x.double(), weight.double(), index, *wide)) < FP32
        return
    s = moe_sort.sort_tokens(index, 4)
    x8 = rows_fp8(x)  # the interpreter cannot round to e4m3
    assert torch.allclose(moe_fp8.quantize_rows(x)[1], x8[1], rtol=2**-22, atol=0)
    turned = x8[0].double() * x8[1].double().repeat_interleave(128, 1)
    act = moe_fp8.gate_up(x8, s, *values[:2], scales[:2], torch.float32)
    expected = [moe_gemm.gate_up(turned.float(), s, *(w.float() for w in wide[:2]), keep=False)[0]]
    act8 = rows_fp8(act)
    rows = moe_fp8.down(act8, s, values[2], scales[2], torch.float32)
    turned = act8[0].double() * act8[1].double().repeat_interleave(128, 1)
    expected += [moe_gemm.down(turned.float(), s, wide[2].float())]
    end = int(s.start_E[-1])
    for a, b in zip((act, rows), expected, strict=True):
        assert worst(a[:end], b[:end]) < 2 * FP32


# ---------------------------------------------------------------------------------------------------------------------
# Hopper's forms, in Python
# ---------------------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "model", "width", "ring", "dtype", "processors"),
    [
        (75, 2, 2, 256, 256, (4, 0), torch.bfloat16, 2),
        (135, 1, 2, 256, 256, (3, 1), torch.float32, 3),
    ],
)
def test_hopper_products_equal_the_portable_ones(tokens, top_k, experts, model, width, ring, dtype, processors, monkeypatch):
    """BF16 results of FP64 sums against FP32 ones on the same BF16 numbers: half a unit in the last place, 2^-8.

    dh, w a and dw come from a kernel of Triton's: its interpreter cuts BF16 off instead of rounding, 2^-7, so FP32 tells more. dh
    and dw have the rounding of p = dout D before: 2^-8 more, and 2^-8 of the sum of |p a|.
    """
    import gluon_on_cpu as emulator

    from openling.ops.kernels import moe_hopper, moe_hopper_back, moe_hopper_parts
    from openling.ops.kernels.moe_hopper_parts import Ring

    x, _, _, gate, up, down = layer(tokens, model, width, experts, dtype=torch.bfloat16)
    weight, dout = randn(tokens, top_k, seed=5).abs(), randn(tokens, model, seed=6, dtype=torch.bfloat16)
    index = choices(tokens, top_k, experts, "even")
    s = moe_sort.sort_tokens(index, experts)
    with emulator.gluon_on_cpu(moe_hopper, moe_hopper_back, moe_hopper_parts):
        monkeypatch.setattr(moe_hopper_parts, "processors", lambda device: processors)
        rows, back, how = moe_hopper, moe_hopper_back, {"ring": Ring(*ring)}
        act, h = rows.gate_up(x, s, gate, up, keep=True, **how)
        found = [act, h, rows.down(act, s, down, **how), *rows.d_act(dout, weight, s, down, h, **how)]
        found += [rows.d_x(found[3], s, gate, up, **how), back.d_down(dout, found[4], s, dtype, **how)]
        found += back.d_gate_up(found[3], x, s, dtype, **how)
    act, h, _, dh, weighted, *_ = (t.float() for t in found)
    x, gate, up, down, dout = (t.float() for t in (x, gate, up, down, dout))
    expected = [*moe_gemm.gate_up(x, s, gate, up, keep=True), moe_gemm.down(act, s, down)]
    expected += moe_gemm.d_act(dout, weight, s, down, h)
    expected += [moe_gemm.d_x(dh, s, gate, up), moe_gemm.d_down(dout, weighted, s, torch.float32)]
    expected += moe_gemm.d_gate_up(dh, x, s, torch.float32)
    rows = int(s.start_E[-1])
    found[5], expected[5] = found[5].sum(0)[:, None], expected[5].sum(0)[:, None]  # column blocks differ
    token = s.entry_R[:rows].clamp_min(0).long() // top_k
    expert = torch.searchsorted(s.start_E[1:], torch.arange(rows, dtype=torch.int32), right=True)
    p = torch.einsum("rm,rmf->rf", dout[token], down[expert]) * (s.entry_R[:rows] >= 0)[:, None]
    exact = swiglu_backward(F.pad(p, (0, 0, 0, len(h) - rows)), weight, s, h)
    for a, b in zip((exact[0], exact[1], exact[2].T), expected[3:6], strict=True):
        assert worst(a[:rows], b[:rows]) < FP32
    of_sum = (p * act[:rows]).abs().sum(1).max() / expected[5][:rows].abs().max()
    limits = {3: 2**-7 + 2**-8, 4: 2**-7, 5: 2**-8 * of_sum.item()}
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        kept = slice(None) if i > 6 else slice(0, rows)
        assert worst(a[kept], b[kept]) < limits.get(i, 0.0 if a.dtype == torch.float32 else 2**-8) + FP32


@interpreted
@pytest.mark.parametrize(("tokens", "processors", "ring", "lead"), [(70, 2, 4, 1), (700, 3, 3, 0)])
def test_hoppers_router_products(tokens, processors, ring, lead, monkeypatch):
    """FP64 sums of exact products, written in FP32."""
    import gluon_on_cpu as emulator

    from openling.ops.kernels import moe_hopper_parts, moe_hopper_router

    x = randn(tokens, 256, dtype=torch.bfloat16)
    terms, dlogits = (
        torch.stack((high, (wide - high.float()).bfloat16()))
        for wide in (randn(256, 256, seed=1), randn(tokens, 256, seed=2))
        for high in (wide.bfloat16(),)
    )
    with emulator.gluon_on_cpu(moe_hopper_router, moe_hopper_parts):
        monkeypatch.setattr(moe_hopper_parts, "processors", lambda device: processors)
        ring = moe_hopper_parts.Ring(ring, lead)
        logits = moe_hopper_router.route_logits(x, terms, ring)
        dweight = moe_hopper_router.route_dweight(dlogits, x, torch.float32, ring)
    assert worst(logits, x.double() @ terms.double().sum(0).T) < FP32
    assert worst(dweight, dlogits.double().sum(0).T @ x.double()) < FP32
