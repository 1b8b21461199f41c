"""Back through SwiGLU, element by element, where the product p = dout D has been written: bound by memory.

Twin: the epilogue of `moe_gemm.d_act`. Legend: as in `kernels.moe_gemm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openling.ops.kernels.moe_sort import Sorted

ROWS = 4  # of a program with 4 warps: 16 values per thread at a width of 512, two loads of 16 bytes of each tensor


@triton.jit
def _swiglu_backward_kernel(
    p_RF, entry_R, end, weight_P, h_R2F, dh_R2F, weighted_RF, dweight_R, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Whole rows, so that dw = p . a is one sum. `end` points to the number of rows; there are memory and programs for more."""
    first = tl.program_id(0) * ROWS
    if first >= tl.load(end):
        return
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    f = tl.arange(0, COLUMNS)
    mask = (f < F)[None, :]
    entry = tl.load(entry_R + row)
    w = tl.load(weight_P + entry, mask=entry >= 0, other=0.0)
    h_at = row[:, None] * (2 * F) + f[None, :]
    at = row[:, None] * F + f[None, :]
    g = tl.load(h_R2F + h_at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(h_R2F + h_at + F, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(p_RF + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    act = g * sigmoid * u
    dact = p * w[:, None]
    dtype: tl.constexpr = dh_R2F.dtype.element_ty
    tl.store(weighted_RF + at, (act * w[:, None]).to(dtype), mask=mask)
    tl.store(dh_R2F + h_at, (dact * u * sigmoid * (1.0 + g * (1.0 - sigmoid))).to(dtype), mask=mask)
    tl.store(dh_R2F + h_at + F, (dact * g * sigmoid).to(dtype), mask=mask)
    tl.store(dweight_R + row, tl.sum(p * act, 1))


def swiglu_backward(p_RF: Tensor, weight_Nk: Tensor, s: Sorted, h_R2F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dh [R, 2F], w a [R, F] and the weights' gradient [1, R] (FP32), from p = dout D. R is a multiple of 64."""
    rows, width = p_RF.shape
    dh, weighted = torch.empty_like(h_R2F), torch.empty_like(p_RF)
    dweight = torch.empty(1, rows, dtype=torch.float32, device=p_RF.device)
    if rows:
        _swiglu_backward_kernel[(rows // ROWS,)](
            p_RF, s.entry_R, s.start_E[-1:], weight_Nk, h_R2F, dh, weighted, dweight, width, ROWS,
            triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    return dh, weighted, dweight
