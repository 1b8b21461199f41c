"""Routed experts in FP8, for training: the products of gate, up and down, their tokens' and their weights' gradients in e4m3.

Every operand is quantised where it is used, from BF16, along what the product sums over:

    product                                left operand             right operand            rowwise         blockwise
    forward          y = x W^T             x along M                W along M                whole rows      1 x 128; 128 x 128
    tokens' gradient dx = dy W             dy along F               W along F                whole rows      1 x 128; 128 x 128
    weights'         dW = dy^T x           dy along the tokens      x along the tokens       an expert's     128 tokens; 128

(M and F for gate and up, F and M for down.) A scale is 448 / the largest magnitude, in `rowwise` a power of two. `blockwise` is
what Ling 2.0 was trained with. Sums are FP32, results BF16; master weights and what comes before and after stay as they were.

The products are torchao's on torch's `_scaled_grouped_mm` (rowwise) or on DeepGEMM (blockwise): an optional extra. `grouped_twin`
is the definition, and runs anywhere. An expert's rows are filled up with zeros to whole units, of which each has at least one.
Legend: N tokens, k experts per token, P = N k choices, E experts, R rows sorted by expert, A and B widths, M model width, F
expert width.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openling.errors import UserError
from openling.ops.fused import swiglu_packed
from openling.ops.moe import count_tokens
from openling.ops.norm import stream_kernels
from openling.ops.pick import kernels_for

Form = Literal["rowwise", "blockwise"]
LARGEST = 448.0  # of e4m3
LEAST = 1e-12  # a block of smaller numbers is scaled as if this were its largest
UNIT = {"rowwise": 16, "blockwise": 128}  # rows of an expert, and widths, are multiples


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs
# ---------------------------------------------------------------------------------------------------------------------


def check_fp8(form: Form, device: torch.device, widths: tuple[int, ...]) -> None:
    """A `UserError` where experts of these widths cannot run in FP8 on this device."""
    unit = UNIT[form]
    if odd := next((width for width in widths if width % unit), None):
        what = "FP8 products need other widths of model and experts"
        raise UserError(
            what, where="fp8_experts", value=f"{form}, a width of {odd}", expected=f"multiples of {unit} on every rank"
        )
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability != (9, 0):
        found = device.type if capability is None else f"{torch.cuda.get_device_name(device)}, {capability[0]}.{capability[1]}"
        raise UserError(
            "FP8 experts do not run on this device", where="fp8_experts", value=f"{form} on {found}",
            expected='an NVIDIA GPU of compute capability 9.0 (H100, H200), or fp8_experts = "none"',
        )  # fmt: skip
    try:
        import torchao.prototype.moe_training  # noqa: F401
    except ImportError as error:
        raise UserError(
            "FP8 experts need torchao", where="fp8_experts", value=f"{form}: {error}", next="pip install 'openling[fp8]'"
        ) from error
    if form == "blockwise" and not _deep_gemm():
        raise UserError(
            "blockwise FP8 experts need DeepGEMM: without it torchao would multiply in BF16", where="fp8_experts", value=form,
            expected='deep_gemm with grouped products, built from its repository, or fp8_experts = "rowwise"',
        )  # fmt: skip


def _deep_gemm() -> bool:
    """Whether torchao would find DeepGEMM's grouped products, for rows and for weights' gradients."""
    try:
        import deep_gemm
    except (ImportError, OSError):
        return False
    rows = ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_fp4_gemm_nt_contiguous")
    return any(hasattr(deep_gemm, name) for name in rows) and hasattr(deep_gemm, "k_grouped_fp8_gemm_nt_contiguous")


# ---------------------------------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------------------------------


def fp8_experts(
    x_NM: Tensor,
    weight_Nk: Tensor,
    index_Nk: Tensor,
    gate_EFM: Tensor,
    up_EFM: Tensor,
    down_EMF: Tensor,
    *,
    form: Form,
) -> Tensor:
    """`moe.swiglu_experts` with FP8 products. A row's weight enters before the last product, whose scales absorb it."""
    _, half = stream_kernels(x_NM)
    x_NM = x_NM.to(half)
    rows = sorted_rows(index_Nk, gate_EFM.shape[0], UNIT[form])
    x_RM = _Spread.apply(x_NM, rows.token_R, rows.row_Nk)
    weight_R1 = _Spread.apply(weight_Nk.reshape(-1, 1), rows.entry_R, rows.row_Nk.reshape(-1, 1))
    gate_up = torch.cat([gate_EFM.to(half), up_EFM.to(half)], 1)
    act_RF = _Weighted.apply(swiglu_packed(grouped(x_RM, gate_up, rows.end_E, form)), weight_R1)
    return _Collect.apply(grouped(act_RF, down_EMF.to(half), rows.end_E, form), rows.token_R, rows.row_Nk)


class Rows(NamedTuple):
    """Where every choice's row is and whose every row is; int64, but `end_E`."""

    row_Nk: Tensor
    entry_R: Tensor  # number of the choice, P in rows that only fill up
    token_R: Tensor  # its token, N in rows that only fill up
    end_E: Tensor  # int32: the row behind each expert's last; rows may be left behind all of them


def sorted_rows(index_Nk: Tensor, experts: int, unit: int) -> Rows:
    """Rows by expert, then by token, every expert's a multiple of `unit` and at least that; no wait for the host."""
    flat_P, device = index_Nk.flatten(), index_Nk.device
    counts_E = count_tokens(index_Nk, experts)
    sizes_E = (counts_E.clamp(min=1) + unit - 1) // unit * unit
    end_E = sizes_E.cumsum(0)
    shift_E = end_E - sizes_E - (counts_E.cumsum(0) - counts_E)
    order_P = flat_P.argsort(stable=True)
    place_P = torch.arange(flat_P.numel(), device=device)
    row_P = torch.empty_like(place_P)
    row_P[order_P] = place_P + shift_E[flat_P[order_P]]
    entry_R = torch.full((_enough(flat_P.numel(), experts, unit),), flat_P.numel(), device=device)
    entry_R[row_P] = place_P
    return Rows(row_P.view_as(index_Nk), entry_R, entry_R // index_Nk.shape[1], end_E.to(torch.int32))


def _enough(entries: int, experts: int, unit: int) -> int:
    """Rows that any distribution fits in, one of 32 numbers between two powers of two.

    torchao times 36 configurations of a kernel anew for every number of rows; on expert ranks each step brings another.
    """
    rows = (entries // unit + experts) * unit
    step = max(unit, 2 ** (rows.bit_length() - 6))
    return -(-rows // step) * step


def _spread(x_NA: Tensor, source_R: Tensor) -> Tensor:
    """x's rows, and zeros where the source is N."""
    return F.pad(x_NA, (0, 0, 0, 1)).index_select(0, source_R)


def _collect(rows_RA: Tensor, row_Nk: Tensor) -> Tensor:
    """The sum of each token's rows."""
    fast = kernels_for(rows_RA)
    if fast is not None:
        return fast.sum_rows(rows_RA.contiguous(), row_Nk.flatten().int(), row_Nk.shape[0])
    return rows_RA.index_select(0, row_Nk.flatten()).unflatten(0, row_Nk.shape).sum(1)


class _Spread(torch.autograd.Function):
    """`_spread`, whose gradient is `_collect`: nothing is added by chance's order."""

    @staticmethod
    def forward(ctx: Any, x_NA: Tensor, source_R: Tensor, row_Nk: Tensor) -> Tensor:
        ctx.save_for_backward(row_Nk)
        return _spread(x_NA, source_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _collect(grads[0], ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """The opposite."""

    @staticmethod
    def forward(ctx: Any, rows_RA: Tensor, source_R: Tensor, row_Nk: Tensor) -> Tensor:
        ctx.save_for_backward(source_R)
        return _collect(rows_RA, row_Nk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grads[0], ctx.saved_tensors[0]), None, None


class _Weighted(torch.autograd.Function):
    """Rows times FP32 weights [R, 1], in the rows' dtype; no FP32 copy of the rows."""

    @staticmethod
    def forward(ctx: Any, rows_RA: Tensor, weight_R1: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RA, weight_R1)
        return torch.mul(rows_RA, weight_R1, out=torch.empty_like(rows_RA))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        rows_RA, weight_R1 = ctx.saved_tensors
        drows = torch.mul(grads[0], weight_R1, out=torch.empty_like(rows_RA))
        return drows, (grads[0] * rows_RA).sum(1, keepdim=True, dtype=weight_R1.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------------------------


def grouped(a_RA: Tensor, weight_EBA: Tensor, end_E: Tensor, form: Form) -> Tensor:
    """Rows times the transposed weights of their experts [R, B], with gradients; what lies behind the last row is not said."""
    if kernels_for(a_RA) is None:
        return grouped_twin(a_RA, weight_EBA, end_E, form)
    columns = weight_EBA.transpose(1, 2)
    if form == "rowwise":
        from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm as product
    else:
        from torchao.prototype.moe_training.blockwise_fp8.grouped_mm import _to_fp8_blockwise_then_scaled_grouped_mm as product
    return product(a_RA, columns, end_E, pad_token_groups_for_grouped_mm=False)


def grouped_twin(a_RA: Tensor, weight_EBA: Tensor, end_E: Tensor, form: Form) -> Tensor:
    """`grouped` by its definition: operands through e4m3 and back, products in FP32, in a's dtype."""
    return _Twin.apply(a_RA, weight_EBA, end_E, form)


class _Twin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_RA: Tensor, weight_EBA: Tensor, end_E: Tensor, form: Form) -> Tensor:
        ctx.save_for_backward(a_RA, weight_EBA)
        ctx.form, ctx.ends = form, [0, *end_E.tolist()]
        out = a_RA.new_zeros(a_RA.shape[0], weight_EBA.shape[1])
        row, _, weight, _ = _blocks(form)
        with torch.autocast(a_RA.device.type, enabled=False):
            for e, (start, end) in enumerate(zip(ctx.ends, ctx.ends[1:], strict=False)):
                out[start:end] = through_e4m3(a_RA[start:end], row) @ through_e4m3(weight_EBA[e], weight).T
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (a_RA, weight_EBA), dout_RB = ctx.saved_tensors, grads[0]
        da, dweight = torch.zeros_like(a_RA), torch.empty_like(weight_EBA)
        row, column, _, weight = _blocks(ctx.form)
        for e, (start, end) in enumerate(zip(ctx.ends, ctx.ends[1:], strict=False)):
            a, dout = a_RA[start:end], dout_RB[start:end]
            da[start:end] = through_e4m3(dout, row) @ through_e4m3(weight_EBA[e], weight)
            dweight[e] = through_e4m3(dout, column).T @ through_e4m3(a, column)
        return da, dweight, None, None


class Blocks(NamedTuple):
    """Numbers of one scale, downwards and across; 0: as many as there are."""

    down: int
    across: int
    powers: bool


def _blocks(form: Form) -> tuple[Blocks, Blocks, Blocks, Blocks]:
    """Of rows, of rows that are summed over, of weights forward and backward."""
    if form == "rowwise":
        return Blocks(1, 0, True), Blocks(0, 1, True), Blocks(1, 0, True), Blocks(0, 1, True)
    return Blocks(1, 128, False), Blocks(128, 1, False), Blocks(128, 128, False), Blocks(128, 128, False)


def through_e4m3(x_AB: Tensor, blocks: Blocks) -> Tensor:
    """x in FP32 as e4m3 with a scale per block holds it."""
    rows, columns = x_AB.shape
    down, across = blocks.down or rows, blocks.across or columns
    x = x_AB.float().reshape(rows // down, down, columns // across, across)
    scale = (LARGEST / x.abs().amax((1, 3), keepdim=True).clamp(min=LEAST).double()).float()
    if blocks.powers:
        scale = torch.ldexp(torch.ones_like(scale), scale.frexp().exponent - 1)
    held = (x * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()
    return (held / scale).reshape(rows, columns)
