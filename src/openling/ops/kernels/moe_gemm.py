"""The five grouped matrix products of the experts in portable Triton; `kernels.moe_hopper` has the same five for Hopper.

Rows are sorted by expert (`kernels.moe_sort`); entries >= 0 name the token of a row, rows that only fill a segment up are zero.
With x_r the token of row r, e its expert, w its weight, G, U, D the gate, up and down projections and h = [g | u] before SwiGLU:

    gate_up    g = x_r G_e^T, u = x_r U_e^T       a = silu(g) u                 writes a, and h where a gradient will be needed
    down       y = a D_e^T
    d_act      p = dout_r D_e                     dw = p . a, dh from w p       writes dh, w a, and dw in parts per column block
    d_x        dx_r = dg G_e + du U_e
    d_weights  dG_e = dg^T x, dU_e = du^T x, dD_e = dout^T (w a), sums over the expert's rows

Tokens are gathered while they are loaded: x and dout are never copied into sorted order. All sums are FP32 in a fixed order.
Legend: N tokens, k experts per token, E experts, R rows, M model width, F expert width, C column blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openling.ops.kernels.moe_sort import UNIT, Sorted


class Tile(NamedTuple):
    """Tile of a product: output rows and columns, depth of one step, warps, loads in flight."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 4


# The chosen tiles; rows of a product over sorted rows are 128 (two units). gate_up: columns of g and of u each.
TILES = {
    "gate_up": Tile(),
    "down": Tile(columns=256),
    "d_act": Tile(),
    "d_x": Tile(columns=256),
    "d_down": Tile(columns=256),
    "d_gate_up": Tile(columns=256),
}


def candidates(name: str) -> list[Tile]:
    """Tiles worth measuring for a product."""
    small = [Tile(stages=3), Tile(warps=4, stages=3)]
    wide = [Tile(columns=256, stages=3), Tile(columns=256)]
    return {"gate_up": [Tile(), *small], "d_act": [Tile(), *small]}.get(name, [*wide, *small])


def precision_of(x: Tensor) -> str:
    """FP32 operands are multiplied as such (tests); half precision has only one way."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def row_tile(tiles, number, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """Expert, first row and row numbers of a tile; whether each row belongs to it."""
    expert = tl.load(tiles + 4 * (1 + number)).to(tl.int64)
    first = tl.load(tiles + 4 * (1 + number) + 1)
    units = tl.load(tiles + 4 * (1 + number) + 2)
    local = tl.arange(0, BLOCK)
    return expert, (first + local).to(tl.int64), local < units * UNIT


@triton.jit
def _gate_up_kernel(
    x_NM, entry_R, tiles, gate_EFM, up_EFM, act_RF, h_R2F, M, F,
    K: tl.constexpr, KEEP: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(F, COLUMNS)
    number = tl.program_id(0) // across
    if number >= tl.load(tiles):
        return
    expert, row, live = row_tile(tiles, number, ROWS, UNIT)
    entry = tl.load(entry_R + row, mask=live, other=-1)
    x_at = x_NM + (entry // K).to(tl.int64)[:, None] * M
    f = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    weight_at = (expert * F + f)[None, :] * M
    depth = tl.arange(0, DEPTH)
    g = tl.zeros((ROWS, COLUMNS), tl.float32)
    u = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, M, DEPTH):
        m = first + depth
        x = tl.load(x_at + m[None, :], mask=(entry >= 0)[:, None] & (m < M)[None, :], other=0.0)
        inside = (m < M)[:, None] & (f < F)[None, :]
        g = tl.dot(x, tl.load(gate_EFM + weight_at + m[:, None], mask=inside, other=0.0), g, input_precision=PRECISION)
        u = tl.dot(x, tl.load(up_EFM + weight_at + m[:, None], mask=inside, other=0.0), u, input_precision=PRECISION)
    act = g / (1.0 + tl.exp(-g)) * u
    mask = live[:, None] & (f < F)[None, :]
    dtype: tl.constexpr = act_RF.dtype.element_ty
    tl.store(act_RF + row[:, None] * F + f[None, :], act.to(dtype), mask=mask)
    if KEEP:
        tl.store(h_R2F + row[:, None] * (2 * F) + f[None, :], g.to(dtype), mask=mask)
        tl.store(h_R2F + row[:, None] * (2 * F) + (F + f)[None, :], u.to(dtype), mask=mask)


def gate_up(x_NM: Tensor, s: Sorted, gate: Tensor, up: Tensor, *, keep: bool, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Activations [R, F], and [g | u] [R, 2F] (empty unless `keep`)."""
    t = tile or TILES["gate_up"]
    experts, width, model = gate.shape
    rows = s.entry_R.numel()
    act, h = x_NM.new_empty(rows, width), x_NM.new_empty(rows if keep else 0, 2 * width)
    _gate_up_kernel[(s.max_tiles * triton.cdiv(width, t.columns),)](
        x_NM, s.entry_R, s.tiles, gate, up, act, h, model, width, s.row_P.numel() // x_NM.shape[0], keep, UNIT,
        t.rows, t.columns, t.depth, precision_of(x_NM), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return act, h


@triton.jit
def _rows_kernel(
    a_RD, tiles, b0, b1, out_RC, depth_a, border, C, b_expert, b_column, b_depth,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = a @ B_e, where the first `border` rows of the matrix B_e come from b0 and the others from b1."""
    across = tl.cdiv(C, COLUMNS)
    number = tl.program_id(0) // across
    if number >= tl.load(tiles):
        return
    expert, row, live = row_tile(tiles, number, ROWS, UNIT)
    c = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, depth_a, DEPTH):
        second = first >= border
        d = first + tl.arange(0, DEPTH)
        own = d - tl.where(second, border, 0)
        inside = d < tl.where(second, depth_a, border)
        a = tl.load(a_RD + row[:, None] * depth_a + d[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        base = tl.where(second, b1, b0) + expert * b_expert
        b = tl.load(base + own[:, None] * b_depth + c[None, :] * b_column, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = out_RC + row[:, None] * C + c[None, :]
    tl.store(at, total.to(out_RC.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


def _rows(
    a_RD: Tensor, s: Sorted, b0: Tensor, b1: Tensor, columns: int, strides: tuple[int, int], border: int, t: Tile
) -> Tensor:
    out = a_RD.new_empty(a_RD.shape[0], columns)
    if border % t.depth and border < a_RD.shape[1]:
        t = t._replace(depth=16)  # a step must not read from both matrices
    if border % t.depth and border < a_RD.shape[1]:
        raise ValueError(f"the expert width must be a multiple of {t.depth}, got {border}")
    _rows_kernel[(s.max_tiles * triton.cdiv(columns, t.columns),)](
        a_RD, s.tiles, b0, b1, out, a_RD.shape[1], border, columns, b0.stride(0), *strides,
        UNIT, t.rows, t.columns, t.depth, precision_of(a_RD), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out


def down(act_RF: Tensor, s: Sorted, down_EMF: Tensor, tile: Tile | None = None) -> Tensor:
    """Outputs of the experts, not yet weighted: [R, M]."""
    _, model, width = down_EMF.shape
    return _rows(act_RF, s, down_EMF, down_EMF, model, (width, 1), width, tile or TILES["down"])


def d_x(dh_R2F: Tensor, s: Sorted, gate: Tensor, up: Tensor, tile: Tile | None = None) -> Tensor:
    """Gradient of every row's token: [R, M]."""
    _, width, model = gate.shape
    return _rows(dh_R2F, s, gate, up, model, (1, model), width, tile or TILES["d_x"])


@triton.jit
def _swiglu_backward(p, w, row, live, start, F, h_R2F, dh_R2F, weighted_RF):
    """From p = dout D on some columns: writes dh and w a there, returns the columns' share of dw = p . a."""
    f = start + tl.arange(0, p.shape[1])
    mask = live[:, None] & (f < F)[None, :]
    h_at = row[:, None] * (2 * F) + f[None, :]
    g = tl.load(h_R2F + h_at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(h_R2F + h_at + F, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    act = g * sigmoid * u
    dact = p * w[:, None]
    dtype: tl.constexpr = dh_R2F.dtype.element_ty
    tl.store(weighted_RF + row[:, None] * F + f[None, :], (act * w[:, None]).to(dtype), mask=mask)
    tl.store(dh_R2F + h_at, (dact * u * sigmoid * (1.0 + g * (1.0 - sigmoid))).to(dtype), mask=mask)
    tl.store(dh_R2F + h_at + F, (dact * g * sigmoid).to(dtype), mask=mask)
    return tl.sum(p * act, 1)


@triton.jit
def _d_act_kernel(
    dout_NM, entry_R, weight_P, tiles, down_EMF, h_R2F, dh_R2F, weighted_RF, dweight_CR, M, F, rows,
    K: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(F, COLUMNS)
    number = tl.program_id(0) // across
    if number >= tl.load(tiles):
        return
    expert, row, live = row_tile(tiles, number, ROWS, UNIT)
    entry = tl.load(entry_R + row, mask=live, other=-1)
    dout_at = dout_NM + (entry // K).to(tl.int64)[:, None] * M
    block = tl.program_id(0) % across
    f = block * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    p = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, M, DEPTH):
        m = first + depth
        dout = tl.load(dout_at + m[None, :], mask=(entry >= 0)[:, None] & (m < M)[None, :], other=0.0)
        inside = (m < M)[:, None] & (f < F)[None, :]
        b = tl.load(down_EMF + (expert * M + m)[:, None] * F + f[None, :], mask=inside, other=0.0)
        p = tl.dot(dout, b, p, input_precision=PRECISION)
    w = tl.load(weight_P + entry, mask=entry >= 0, other=0.0)
    # Column by column quarter: all of p, g and u at once would not fit the registers.
    low, high = p.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
    dweight = tl.zeros((ROWS,), tl.float32)
    for half in tl.static_range(2):
        part = low if half == 0 else high
        first_quarter, second_quarter = part.reshape(ROWS, 2, COLUMNS // 4).permute(0, 2, 1).split()
        start = block * COLUMNS + half * (COLUMNS // 2)
        dweight += _swiglu_backward(first_quarter, w, row, live, start, F, h_R2F, dh_R2F, weighted_RF)
        dweight += _swiglu_backward(second_quarter, w, row, live, start + COLUMNS // 4, F, h_R2F, dh_R2F, weighted_RF)
    tl.store(dweight_CR + block.to(tl.int64) * rows + row, dweight, mask=live)


def d_act(
    dout_NM: Tensor, weight_Nk: Tensor, s: Sorted, down_EMF: Tensor, h_R2F: Tensor, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dh [R, 2F], w a [R, F] and the weights' gradient in parts [C, R] (FP32)."""
    t = tile or TILES["d_act"]
    _, model, width = down_EMF.shape
    rows, across = s.entry_R.numel(), triton.cdiv(width, t.columns)
    dh, weighted = torch.empty_like(h_R2F), h_R2F.new_empty(rows, width)
    parts = torch.empty(across, rows, dtype=torch.float32, device=dh.device)
    _d_act_kernel[(s.max_tiles * across,)](
        dout_NM, s.entry_R, weight_Nk, s.tiles, down_EMF, h_R2F, dh, weighted, parts, model, width, rows,
        weight_Nk.shape[1], UNIT, t.rows, t.columns, t.depth, precision_of(dout_NM), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return dh, weighted, parts


@triton.jit
def _weights_kernel(
    a, b, entry_R, start_E, out_EAB, a_row, b_row, A, B,
    K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_e = a^T b over the rows of expert e; the operand that lies by token is gathered."""
    across = tl.cdiv(B, COLUMNS)
    tiles = tl.cdiv(A, ROWS) * across
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    i = (tile // across) * ROWS + tl.arange(0, ROWS)
    j = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.load(start_E + expert), tl.load(start_E + expert + 1), DEPTH):
        row = (first + tl.arange(0, DEPTH)).to(tl.int64)
        entry = tl.load(entry_R + row)
        token = (entry // K).to(tl.int64)
        real = (entry >= 0)[:, None]
        a_at = a + (token if GATHER_A else row)[:, None] * a_row + i[None, :]
        b_at = b + (token if GATHER_B else row)[:, None] * b_row + j[None, :]
        left = tl.load(a_at, mask=real & (i < A)[None, :], other=0.0)
        right = tl.load(b_at, mask=real & (j < B)[None, :], other=0.0)
        total = tl.dot(left.T, right, total, input_precision=PRECISION)
    at = out_EAB + (expert.to(tl.int64) * A + i)[:, None] * B + j[None, :]
    tl.store(at, total.to(out_EAB.dtype.element_ty), mask=(i < A)[:, None] & (j < B)[None, :])


def _weights(a: Tensor, b: Tensor, s: Sorted, out: Tensor, *, tokens: int, gather_a: bool, t: Tile) -> Tensor:
    experts, rows, columns = out.shape
    _weights_kernel[(experts * triton.cdiv(rows, t.rows) * triton.cdiv(columns, t.columns),)](
        a, b, s.entry_R, s.start_E, out, a.stride(0), b.stride(0), rows, columns, s.row_P.numel() // tokens,
        gather_a, not gather_a, t.rows, t.columns, t.depth, precision_of(a), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out


def d_down(dout_NM: Tensor, weighted_RF: Tensor, s: Sorted, dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """Gradient of the down projections [E, M, F] in `dtype`."""
    out = dout_NM.new_empty(s.counts_E.numel(), dout_NM.shape[1], weighted_RF.shape[1], dtype=dtype)
    return _weights(dout_NM, weighted_RF, s, out, tokens=dout_NM.shape[0], gather_a=True, t=tile or TILES["d_down"])


def d_gate_up(dh_R2F: Tensor, x_NM: Tensor, s: Sorted, dtype: torch.dtype, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of the gate and up projections [E, F, M] in `dtype`."""
    width = dh_R2F.shape[1] // 2
    dgate, dup = (x_NM.new_empty(s.counts_E.numel(), width, x_NM.shape[1], dtype=dtype) for _ in range(2))
    for half, out in ((dh_R2F[:, :width], dgate), (dh_R2F[:, width:], dup)):
        _weights(half, x_NM, s, out, tokens=x_NM.shape[0], gather_a=False, t=tile or TILES["d_gate_up"])
    return dgate, dup
