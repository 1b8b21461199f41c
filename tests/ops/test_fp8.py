"""Experts in FP8: the twin against FP64 and against itself in pieces, rows and their order, what is refused; on an H100 torchao
against the twin.

A rounding to e4m3 is off by up to 2^-4 of a power of two, evenly: 2^-4 / sqrt(3) in the mean square, of values around 1.5 times a
power of two. That is less than U = 2^-5, and independent roundings add up in squares.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from moe_layers import DEVICE, choices, layer, randn, summed
from triton.runtime import Autotuner

from openling.errors import UserError
from openling.ops import fp8
from openling.ops.fp8 import Blocks, check_fp8, fp8_experts, grouped, grouped_twin, sorted_rows, through_e4m3

U = 2**-5
FORMS = ("rowwise", "blockwise")
on_h100 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an H100 or H200"
)


def off(found, expected):
    """Root mean square of the error relative to that of the values."""
    return ((found.double() - expected).pow(2).mean() / expected.pow(2).mean()).sqrt().item()


def gradients(function, leaves, dout):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def uneven(unit, width=256, other=384, dtype=torch.float32):
    """Rows, weights, ends, gradients of rows, the last end: experts whose only unit fills up, with full and partly filled ones;
    rows behind the last."""
    sizes, filled = (1, 7, 1, 20, 3), (unit - 5, 7 * unit - 1, 0, 20 * unit, 2 * unit + 1)
    real = torch.cat([torch.arange(size * unit) < n for size, n in zip(sizes, filled, strict=True)])
    real = torch.nn.functional.pad(real, (0, 2 * unit)).to(DEVICE)[:, None]
    a, dout = (randn(len(real), w, seed=i, dtype=dtype) * real for i, w in enumerate((width, other)))
    weight = (randn(len(sizes), other, width, seed=2) * width**-0.5).to(dtype)
    ends = (torch.tensor(sizes, device=DEVICE) * unit).cumsum(0)
    return a, weight, ends.to(torch.int32), dout, int(ends[-1])


@pytest.mark.parametrize("blocks", [Blocks(1, 0, True), Blocks(0, 1, True), Blocks(1, 128, False), Blocks(128, 128, False)])
def test_a_number_is_off_by_a_sixteenth_at_most(blocks):
    """Of itself or, below e4m3's least normal number, of that: 2^-10 in units of a scale that makes the largest at least 224."""
    x = randn(256, 384) * torch.logspace(-6, 6, 256, device=DEVICE)[:, None]
    x[3] = 0
    held = through_e4m3(x, blocks)
    down, across = blocks.down or 256, blocks.across or 384
    largest = x.view(256 // down, down, 384 // across, across).abs().amax((1, 3), keepdim=True)
    least = (largest / 224 * 2**-10).expand(-1, down, -1, across).reshape(x.shape)
    assert ((held - x).abs() <= 2**-4 * x.abs() + least).all()
    assert (held[3] == 0).all()
    assert len(held[0].unique()) < len(x[0].unique())
    signs_and_exponents = 2 * 8 * 17  # of e4m3: no row can hold more values
    assert len(through_e4m3(x, Blocks(1, 0, True))[5].unique()) <= signs_and_exponents


def test_power_of_two_scales_are_the_largest_that_fit():
    x = torch.tensor([[448.0, 1.0], [449.0, 1.0], [224.0, 1.0], [3.0, 1e-30]])
    held = through_e4m3(x, Blocks(1, 0, True))
    assert held.tolist() == [[448.0, 1.0], [448.0, 1.0], [224.0, 1.0], [3.0, 0.0]]


@pytest.mark.parametrize("form", FORMS)
def test_products_are_as_exact_as_two_roundings(form):
    """Every operand is rounded once, so a product is off by sqrt(2) U; a third of U shows that FP8 was there at all."""
    a, weight, ends, dout, _ = uneven(fp8.UNIT[form])
    found = gradients(lambda a, w: grouped_twin(a, w, ends, form), (a, weight), dout)
    out, da, dweight = torch.zeros_like(dout), torch.zeros_like(a), torch.zeros_like(weight)
    for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        out[start:end] = a[start:end] @ weight[e].T
        da[start:end] = dout[start:end] @ weight[e]
        dweight[e] = dout[start:end].T @ a[start:end]
    for mine, true in zip(found, (out, da, dweight), strict=True):
        assert U / 3 < off(mine, true.double()) < 2**0.5 * U


@pytest.mark.parametrize("form", FORMS)
def test_products_read_what_the_table_says(form):
    """Scales follow the sum: a row, or 128 of its numbers, in forward and the tokens' gradient; a column in the weights'."""
    unit = fp8.UNIT[form]
    a, weight, ends, dout, _ = uneven(unit)
    out, da, dweight = gradients(lambda a, w: grouped_twin(a, w, ends, form), (a, weight), dout)
    start, end = int(ends[0]), int(ends[1])
    x, dy, w = a[start:end], dout[start:end], weight[1]
    if form == "rowwise":
        rows, columns, by_row, by_column = Blocks(1, 0, True), Blocks(0, 1, True), Blocks(1, 0, True), Blocks(0, 1, True)
    else:
        rows, columns, by_row, by_column = Blocks(1, 128, False), Blocks(128, 1, False), *[Blocks(128, 128, False)] * 2
    torch.testing.assert_close(out[start:end], through_e4m3(x, rows) @ through_e4m3(w, by_row).T)
    torch.testing.assert_close(da[start:end], through_e4m3(dy, rows) @ through_e4m3(w, by_column))
    torch.testing.assert_close(dweight[1], through_e4m3(dy, columns).T @ through_e4m3(x, columns))
    assert (out[int(ends[-1]) :] == 0).all()
    assert (dweight[2] == 0).all()


@pytest.mark.parametrize("kind", ["even", "skewed", "one"])
@pytest.mark.parametrize("unit", [16, 128])
def test_rows_are_by_expert_and_whole_units(unit, kind):
    index = choices(77, 1 if kind == "one" else 3, 9, kind)
    rows = sorted_rows(index, 9, unit)
    ends = rows.end_E.tolist()
    assert all(end % unit == 0 for end in ends) and len(rows.entry_R) % unit == 0 and ends[-1] <= len(rows.entry_R)
    entries, last = [], 0
    for expert, end in enumerate(ends):
        segment, last = rows.entry_R[last:end].tolist(), end
        real = (index.flatten() == expert).nonzero().flatten().tolist()
        assert segment[: len(real)] == real
        assert set(segment[len(real) :]) <= {index.numel()}
        assert 0 <= len(segment) - max(len(real), 1) < unit
        entries += segment
    assert rows.entry_R[rows.row_Nk.flatten()].tolist() == list(range(index.numel()))
    assert (rows.token_R == rows.entry_R // index.shape[1]).all()
    assert (rows.entry_R[last:] == index.numel()).all()


def test_few_numbers_of_rows_come_up():
    """33 from 4096 to 8192, each at most one step of 128 above what is needed."""
    one = torch.zeros(8192, 1, dtype=torch.int64)
    numbers = [len(sorted_rows(one[:n], 4, 16).entry_R) - n for n in range(4096, 8192 - 64)]
    assert len({n + 4096 + i for i, n in enumerate(numbers)}) <= 33
    assert all(0 <= number <= 64 + 128 for number in numbers)


def expected_of(x, weight, index, experts, dout):
    """FP64: the sum and its gradients."""
    leaves = [t.double() for t in (x, weight, *experts)]
    return gradients(lambda x, w, *parts: summed(x, w, index, *parts), leaves, dout.double())


def assert_within_roundings(found, expected):
    """Output: x and W in g and u, which enter silu(g) u with (E silu'^2 + E silu^2) / E silu^2 = 2.1 times their squares for
    normal values, and the row and D of the last product: 4.2 + 2 squares of U. Gradients: dout and D, the same 4.2 for the h
    they are taken at, and two operands more: 8.2. BF16 adds nothing that shows. The error must be a third of that as well.
    """
    for found_one, true, squares in zip(found, expected, (6.2, *[8.2] * 5), strict=True):
        assert squares**0.5 * U / 3 < off(found_one, true) < squares**0.5 * U


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["even", "skewed"])
def test_layer_is_as_exact_as_its_roundings(form, kind):
    """Experts without a token, and numbers of tokens that no unit divides."""
    x, _, _, *experts = layer(317, 256, 384, 8)
    index = choices(317, 2, 7, kind)
    weight, dout = torch.rand(317, 2, device=x.device) + 0.1, randn(317, 256, seed=9)
    found = gradients(lambda x, w, *parts: fp8_experts(x, w, index, *parts, form=form), (x, weight, *experts), dout)
    assert_within_roundings(found, expected_of(x, weight, index, experts, dout))
    assert all((grad[7] == 0).all() for grad in found[3:])


def test_no_token_is_no_row():
    x, _, _, *experts = layer(0, 32, 16, 4)
    none = torch.zeros(0, 2, dtype=torch.int64, device=x.device)
    found = gradients(lambda x, *parts: fp8_experts(x, none.float(), none, *parts, form="rowwise"), (x, *experts), x)
    assert found[0].shape == (0, 32) and all((grad == 0).all() for grad in found[2:])


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(UserError, match='(?s)do not run on this device.*rowwise on cpu.*9.0.*fp8_experts = "none"'):
        check_fp8("rowwise", torch.device("cpu"), (512, 2048))
    with pytest.raises(UserError, match="(?s)a width of 520.*multiples of 16"):
        check_fp8("rowwise", torch.device("cpu"), (520, 2048))
    with pytest.raises(UserError, match="(?s)a width of 192.*multiples of 128"):
        check_fp8("blockwise", torch.device("cpu"), (2048, 192))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"(?s)rowwise on NVIDIA A100, 8\.0"):
        check_fp8("rowwise", gpu, (512, 2048))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"(?s)need torchao.*pip install 'openling\[fp8\]'"):
        check_fp8("rowwise", gpu, (512, 2048))
    for name in ("torchao", "torchao.prototype", "torchao.prototype.moe_training"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    check_fp8("rowwise", gpu, (512, 2048))
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(m_grouped_fp8_gemm_nt_contiguous=None))
    with pytest.raises(UserError, match="(?s)need DeepGEMM.*rowwise"):
        check_fp8("blockwise", gpu, (512, 2048))


# ---------------------------------------------------------------------------------------------------------------------
# torchao against the twin
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch):
    """torchao, whose kernels for blocks take their first configuration: trying all 45 at every width takes minutes."""
    pytest.importorskip("torchao")
    from torchao.prototype.blockwise_fp8_training import kernels

    for kernel in vars(kernels).values():
        if isinstance(kernel, Autotuner):
            monkeypatch.setattr(kernel, "configs", kernel.configs[:1])


@on_h100
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "other"), [(256, 384), (2048, 1024), (512, 2048)])
def test_library_equals_the_twin(form, width, other):
    """Both round the same numbers to the same e4m3, so what is left is how sums are formed and BF16.

    Rowwise: Hopper adds the products of 32 columns to an accumulator and cuts off what is below 2^-13 of the largest, always
    towards 0: at most 2^-13 at each of n / 32 steps of a sum over n, and the result is rounded to BF16 (2^-9). Blockwise without
    DeepGEMM multiplies in BF16: scale and value of both operands and the result are rounded, less than 2^-7 together.
    """
    a, weight, ends, dout, last = uneven(fp8.UNIT[form], width, other, torch.bfloat16)
    found = gradients(lambda a, w: grouped(a, w, ends, form), (a, weight), dout)
    expected = gradients(lambda a, w: grouped_twin(a, w, ends, form), (a.float(), weight.float()), dout)
    sums = width, other, 20 * fp8.UNIT[form]
    for mine, twin, n in zip(found, expected, sums, strict=True):
        mine, twin = (mine, twin) if mine.dim() == 3 else (mine[:last], twin[:last])
        assert mine.dtype == torch.bfloat16
        assert off(mine, twin.double()) < (2**-13 * n / 32 + 2**-9 if form == "rowwise" else 2**-7)
    assert (found[2][2] == 0).all()


@on_h100
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["even", "skewed"])
def test_layer_in_the_library_is_as_exact_as_its_roundings(form, kind):
    """As the twin on a CPU, in BF16; run again it has the same bits; FP32 weights get FP32 gradients."""
    x, _, _, *experts = layer(3001, 2048, 512, 16)
    x = x.bfloat16()
    index = choices(3001, 4, 15, kind)
    weight, dout = torch.rand(3001, 4, device=x.device) + 0.1, randn(3001, 2048, seed=9, dtype=torch.bfloat16)
    found, again = (
        gradients(lambda x, w, *parts: fp8_experts(x, w, index, *parts, form=form), (x, weight, *experts), dout) for _ in range(2)
    )
    assert_within_roundings(found, expected_of(x, weight, index, experts, dout))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert all(grad.dtype == torch.float32 and (grad[15] == 0).all() for grad in found[3:])
