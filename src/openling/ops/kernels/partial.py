"""What the small kernels share: tensors as rows, and weight gradients summed in a fixed order.

A backward kernel runs a fixed number of programs. Each walks the rows p, p + P, p + 2P, ... and keeps its share of the weight's
gradient in registers; a second launch adds the P shares in ascending order. Results are bitwise repeatable, without atomics.
Legend: N rows, C channels, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Streaming multiprocessors of an H100 or H200. A constant, not the machine's own count: gradients then agree between machines.
PROCESSORS = 132


@triton.jit
def _norm_weight_sums(partial, out, border, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (i, s) sums column block i of part s of the rows: part 0 ends at `border`, part 1 begins there."""
    part = tl.program_id(1)
    begin, end = tl.where(part == 0, 0, border), tl.where(part == 0, border, rows)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        live = (first + row < end) & (column < width)[None, :]
        total += tl.load(partial + (first + row) * width + column[None, :], mask=live, other=0.0)
    tl.store(out + part * width + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


def sum_partials(partial_PC: Tensor, dtype: torch.dtype, border: int | None = None) -> Tensor:
    """Column sums [C] in `dtype`; with a border [2, C], the sums of the rows before it and of those from it on."""
    rows, width = partial_PC.shape
    out = partial_PC.new_empty((width,) if border is None else (2, width), dtype=dtype)
    grid = (triton.cdiv(width, 16), 1 if border is None else 2)
    _norm_weight_sums[grid](partial_PC, out, rows if border is None else border, rows, width, 256, 16, num_warps=4)
    return out


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [N, C] with unit stride along C. A copy only where there is no such view."""
    return unit_stride(x).reshape(-1, x.shape[-1])


def unit_stride(x: Tensor) -> Tensor:
    """x itself where neighbours along the last dim are neighbours in memory, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
