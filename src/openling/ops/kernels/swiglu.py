"""silu(gate) * up, forward and backward; twins: `ops.fused.swiglu` and `ops.fused.swiglu_packed`.

FP32 inside, one rounding. With s = sigmoid(g): d gate = dy u s (1 + g (1 - s)), d up = dy g s. Bytes per value in half
precision: 6 forward, 10 backward.
Legend: N rows, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from openling.ops.kernels.partial import as_rows

# Values of a program's tile, 16 per thread, and the longest piece of one row in it.
TILE, LONGEST = 2048, 1024


@triton.jit
def _swiglu_forward(gate, up, out, rows, gate_row, up_row, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = silu(gate) up for a tile of ROWS rows and COLUMNS columns."""
    pieces: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    first = (tl.program_id(0) // pieces).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % pieces) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    live = (row < rows - first) & (column < WIDTH)
    g = tl.load(gate + first * gate_row + (row * gate_row + column), mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + first * up_row + (row * up_row + column), mask=live, other=0.0).to(tl.float32)
    tl.store(out + first * WIDTH + (row * WIDTH + column), (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_gradients(
    gate, up, dout, dgate, dup, rows, gate_row, up_row, dout_row, grad_row,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dgate and dup for a tile; both have rows of stride grad_row."""
    pieces: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    first = (tl.program_id(0) // pieces).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % pieces) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    live = (row < rows - first) & (column < WIDTH)
    g = tl.load(gate + first * gate_row + (row * gate_row + column), mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + first * up_row + (row * up_row + column), mask=live, other=0.0).to(tl.float32)
    d = tl.load(dout + first * dout_row + (row * dout_row + column), mask=live, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    at = first * grad_row + (row * grad_row + column)
    tl.store(dgate + at, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=live)
    tl.store(dup + at, (d * g * s).to(dup.dtype.element_ty), mask=live)


def _tile(rows: int, width: int) -> tuple[int, int, int]:
    """Programs, and rows and columns of a tile."""
    columns = min(LONGEST, triton.next_power_of_2(width))
    tile_rows = max(1, TILE // columns)
    return triton.cdiv(rows, tile_rows) * triton.cdiv(width, columns), tile_rows, columns


def _out(gate: Tensor, up: Tensor) -> Tensor:
    gate_NF, up_NF = as_rows(gate), as_rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, width = gate_NF.shape
    programs, *tile = _tile(rows, width)
    _swiglu_forward[(programs,)](gate_NF, up_NF, out, rows, gate_NF.stride(0), up_NF.stride(0), width, *tile, num_warps=4)
    return out


def _gradients(gate: Tensor, up: Tensor, dout: Tensor, dgate_NF: Tensor, dup_NF: Tensor) -> None:
    """Fill two tensors [N, F] of one row stride."""
    gate_NF, up_NF, dout_NF = as_rows(gate), as_rows(up), as_rows(dout)
    rows, width = gate_NF.shape
    programs, *tile = _tile(rows, width)
    _swiglu_gradients[(programs,)](
        gate_NF, up_NF, dout_NF, dgate_NF, dup_NF, rows,
        gate_NF.stride(0), up_NF.stride(0), dout_NF.stride(0), dgate_NF.stride(0), width, *tile, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("openling::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., F], in gate's dtype; any row strides."""
    return _out(gate, up)


@torch.library.custom_op("openling::swiglu_backward", mutates_args=())
def _swiglu_backward(gate: Tensor, up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    _gradients(gate, up, dout, as_rows(dgate), as_rows(dup))
    return dgate, dup


@torch.library.custom_op("openling::swiglu_packed", mutates_args=())
def swiglu_packed(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [..., F] for rows [gate | up] [..., 2F]."""
    return _out(*gate_up.chunk(2, dim=-1))


@torch.library.custom_op("openling::swiglu_packed_backward", mutates_args=())
def _swiglu_packed_backward(gate_up: Tensor, dout: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    grad = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    dgate_NF, dup_NF = as_rows(grad).chunk(2, dim=-1)
    _gradients(gate, up, dout, dgate_NF, dup_NF)
    return grad


@swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@_swiglu_backward.register_fake
def _(gate: Tensor, up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@swiglu_packed.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_swiglu_packed_backward.register_fake
def _(gate_up: Tensor, dout: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(*ctx.saved_tensors, dout)


def _packed_gradient(ctx: Any, dout: Tensor) -> Tensor:
    return _swiglu_packed_backward(*ctx.saved_tensors, dout)


swiglu.register_autograd(_gradient, setup_context=_keep)
swiglu_packed.register_autograd(_packed_gradient, setup_context=_keep)
