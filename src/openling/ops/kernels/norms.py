"""RMS norms, forward and backward: plain, after a residual add, and in groups under a sigmoid gate.

Twins: `ops.norm.rms_norm`, `ops.fused.add_rms_norm`, `ops.fused.gated_group_norm`. FP32 inside, one rounding at the end, where
the twins round the normed value before its weight. With xhat = x r, r = (mean(x^2) + eps)^-1/2, y = w xhat and g = w dy:

    dx = r g - x r^3 mean(g x)        dw = sum over rows of dy xhat

Backward reads x again and saves nothing else. Bytes per channel in half precision: norm 4 forward, 6 backward; with the add 8
and 8; gated 6 and 10. A row lies across a program's threads, 8 neighbouring channels (16 B) each, so that the weight and its
gradient take few registers and several rows share them.
Legend: N rows, C or M channels, P programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openling.ops.kernels.partial import PROCESSORS, as_rows, sum_partials


class Rows(NamedTuple):
    """Tile of a launch: rows that a program holds at once, its warps; backward programs per processor and stages of loads."""

    rows: int
    warps: int
    programs: int = 1
    stages: int = 1


def rows_config(width: int, *, backward: bool) -> Rows:
    """Forward 16 values of each tensor per thread. Backward 8, or 16 for long rows: these take up to 80 and 128 registers.

    Backward programs stay for the whole launch, so no more may start than a processor holds at once: 24 warps at 80 registers,
    16 at 128. Two more blocks of rows are on their way to shared memory while one is worked on.
    """
    padded = triton.next_power_of_2(width)
    warps = min(max(padded // 256, 1), 16)
    if not backward:
        return Rows(max(1, 16 * 32 * warps // padded), warps)
    rows = max(1, 8 * 32 * warps // padded)
    wide = rows * padded > 8 * 32 * warps
    return Rows(rows, warps, max(1, (16 if wide else 24) // warps), 3 if padded <= 8192 else 1)


def rows_candidates(width: int, *, backward: bool) -> list[Rows]:
    """Tiles worth measuring for rows of this width."""
    padded = triton.next_power_of_2(width)
    tiles = [
        (values * 32 * warps // padded, warps)
        for warps in (1, 2, 4, 8, 16, 32)
        for values in (8, 16, 32)
        if values * 32 * warps >= padded
    ]
    if not backward:
        return [Rows(*tile) for tile in tiles]
    return [
        Rows(rows, warps, programs, stages)
        for rows, warps in tiles
        for programs in (1, 2, 3, 4, 6, 8, 12, 16, 24)
        for stages in (1, 2, 3)
        if 8 <= programs * warps <= 32 and programs * (stages - 1) * rows * padded * 6 <= 200 * 1024
    ]


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm, with and without a residual add before it
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _rms_norm_forward(
    x, delta, weight, h, y, rows, x_row, delta_row, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """y = w xhat for ROWS rows; with ADD x + delta goes to h first, and y is the norm of what was stored there."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    live = row < rows - first
    live = live if WIDTH == PADDED else live & (column < WIDTH)
    out_at = first * WIDTH + row * WIDTH + column
    a = tl.load(x + first * x_row + (row * x_row + column), mask=live, other=0.0).to(tl.float32)
    if ADD:
        a += tl.load(delta + first * delta_row + (row * delta_row + column), mask=live, other=0.0).to(tl.float32)
        stored = a.to(h.dtype.element_ty)
        tl.store(h + out_at, stored, mask=live)
        a = stored.to(tl.float32)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(a * a, 1) / WIDTH + eps)
    tl.store(y + out_at, (a * r[:, None] * w).to(y.dtype.element_ty), mask=live)


@triton.jit
def _rms_norm_backward(
    x, dy, dh, weight, dx, ddelta, partial, rows, x_row, dy_row, dh_row, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, TWO: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx of the rows of program p, and its share of dw. With ADD dh joins dx; with TWO it is written in delta's dtype as well."""
    program = tl.program_id(0)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    dw = tl.zeros((PADDED,), tl.float32)
    for block in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        first = tl.cast(block, tl.int64)
        live = row < rows - block
        live = live if WIDTH == PADDED else live & (column < WIDTH)
        a = tl.load(x + first * x_row + (row * x_row + column), mask=live, other=0.0).to(tl.float32)
        d = tl.load(dy + first * dy_row + (row * dy_row + column), mask=live, other=0.0).to(tl.float32)
        g = d * w
        square, dot = tl.split(tl.sum(tl.join(a * a, g * a), 1))
        r = tl.rsqrt(square / WIDTH + eps)
        back = r * r * r * dot / WIDTH
        dw += tl.sum(d * a * r[:, None], 0)
        g = g * r[:, None] - a * back[:, None]
        if ADD:
            g += tl.load(dh + first * dh_row + (row * dh_row + column), mask=live, other=0.0).to(tl.float32)
        out_at = first * WIDTH + (row * WIDTH + column)
        tl.store(dx + out_at, g.to(dx.dtype.element_ty), mask=live)
        if TWO:
            tl.store(ddelta + out_at, g.to(ddelta.dtype.element_ty), mask=live)
    column = tl.arange(0, PADDED)
    tl.store(partial + program * WIDTH + column, dw, mask=column < WIDTH)


def _norm(x: Tensor, delta: Tensor | None, weight_C: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h = x + delta in x's dtype (x itself where there is no delta) and its norm in `dtype`."""
    x_NC, width = as_rows(x), x.shape[-1]
    delta_NC = x_NC if delta is None else as_rows(delta)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = x if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = rows_config(width, backward=False)
    _rms_norm_forward[(triton.cdiv(x_NC.shape[0], config.rows),)](
        x_NC, delta_NC, weight_C, h, y, x_NC.shape[0], x_NC.stride(0), delta_NC.stride(0), eps,
        width, triton.next_power_of_2(width), config.rows, delta is not None, num_warps=config.warps,
    )  # fmt: skip
    return h, y


@torch.library.custom_op("openling::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The norm of x [..., C] in `dtype`; any row stride."""
    return _norm(x, None, weight_C, eps, dtype)[1]


@torch.library.custom_op("openling::add_rms_norm", mutates_args=())
def add_rms_norm(h: Tensor, delta: Tensor, weight_M: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h + delta [..., M] in h's dtype, and its norm in `dtype`."""
    return _norm(h, delta, weight_M, eps, dtype)


@torch.library.custom_op("openling::rms_norm_backward", mutates_args=())
def _norm_backward(
    x: Tensor, weight_C: Tensor, dy: Tensor, dh: Tensor | None, eps: float, delta_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in x's dtype, the same in `delta_dtype` where that differs (else empty), and dw."""
    x_NC, dy_NC, width = as_rows(x), as_rows(dy), x.shape[-1]
    dh_NC = dy_NC if dh is None else as_rows(dh)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    two = delta_dtype != x.dtype
    ddelta = torch.empty(x.shape if two else (0,), dtype=delta_dtype, device=x.device)
    config, rows = rows_config(width, backward=True), x_NC.shape[0]
    programs = max(1, min(PROCESSORS * config.programs, triton.cdiv(rows, config.rows)))
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _rms_norm_backward[(programs,)](
        x_NC, dy_NC, dh_NC, weight_C, dx, ddelta, partial, rows, x_NC.stride(0), dy_NC.stride(0), dh_NC.stride(0), eps,
        width, triton.next_power_of_2(width), config.rows, dh is not None, two, config.stages, num_warps=config.warps,
    )  # fmt: skip
    return dx, ddelta, sum_partials(partial, weight_C.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@add_rms_norm.register_fake
def _(h: Tensor, delta: Tensor, weight_M: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape, dtype=dtype)


@_norm_backward.register_fake
def _(
    x: Tensor, weight_C: Tensor, dy: Tensor, dh: Tensor | None, eps: float, delta_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    ddelta = x.new_empty(x.shape if delta_dtype != x.dtype else (0,), dtype=delta_dtype)
    return x.new_empty(x.shape), ddelta, weight_C.new_empty(weight_C.shape)


def _keep_rms(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _rms_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, _, dw = _norm_backward(x, weight, dy, None, ctx.eps, x.dtype)
    return dx, dw, None, None


def _keep_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, delta, weight, ctx.eps, _ = inputs
    ctx.delta_dtype = delta.dtype
    ctx.save_for_backward(output[0], weight)


def _add_gradient(ctx: Any, dh: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    dx, ddelta, dw = _norm_backward(h, weight, dy, dh, ctx.eps, ctx.delta_dtype)
    return dx, ddelta if ctx.delta_dtype != h.dtype else dx, dw, None, None


rms_norm.register_autograd(_rms_gradient, setup_context=_keep_rms)
add_rms_norm.register_autograd(_add_gradient, setup_context=_keep_add)


# ---------------------------------------------------------------------------------------------------------------------
# Group RMSNorm under a sigmoid gate
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _gated_norm_forward(
    x, gate, weight, out, rows, x_row, gate_row, eps,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = w xhat sigmoid(gate) for one group of ROWS rows; neighbouring programs take the groups of the same rows."""
    group = tl.program_id(0) % GROUPS
    first = (tl.program_id(0) // GROUPS).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    live = row < rows - first
    live = live if WIDTH == PADDED else live & (column < WIDTH)
    channel = group * WIDTH + column
    a = tl.load(x + first * x_row + (row * x_row + channel), mask=live, other=0.0).to(tl.float32)
    s = tl.sigmoid(tl.load(gate + first * gate_row + (row * gate_row + channel), mask=live, other=0.0).to(tl.float32))
    w = tl.load(weight + channel, mask=column < WIDTH, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(a * a, 1) / WIDTH + eps)
    channels: tl.constexpr = GROUPS * WIDTH
    tl.store(out + first * channels + (row * channels + channel), (a * r[:, None] * w * s).to(out.dtype.element_ty), mask=live)


@triton.jit
def _gated_norm_backward(
    x, gate, dout, weight, dx, dgate, partial, rows, x_row, gate_row, dout_row, eps,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx and dgate of one group of the rows of program p, and its share of that group's dw."""
    group, program = tl.program_id(0) % GROUPS, tl.program_id(0) // GROUPS
    channels: tl.constexpr = GROUPS * WIDTH
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    channel = group * WIDTH + column
    w = tl.load(weight + channel, mask=column < WIDTH, other=0.0).to(tl.float32)
    dw = tl.zeros((PADDED,), tl.float32)
    for block in tl.range(program * ROWS, rows, tl.num_programs(0) // GROUPS * ROWS, num_stages=STAGES):
        first = tl.cast(block, tl.int64)
        live = row < rows - block
        live = live if WIDTH == PADDED else live & (column < WIDTH)
        a = tl.load(x + first * x_row + (row * x_row + channel), mask=live, other=0.0).to(tl.float32)
        s = tl.sigmoid(tl.load(gate + first * gate_row + (row * gate_row + channel), mask=live, other=0.0).to(tl.float32))
        d = tl.load(dout + first * dout_row + (row * dout_row + channel), mask=live, other=0.0).to(tl.float32) * s
        g = d * w
        square, dot = tl.split(tl.sum(tl.join(a * a, g * a), 1))
        r = tl.rsqrt(square / WIDTH + eps)
        back = r * r * r * dot / WIDTH
        dw += tl.sum(d * a * r[:, None], 0)
        out_at = first * channels + (row * channels + channel)
        tl.store(dx + out_at, (g * r[:, None] - a * back[:, None]).to(dx.dtype.element_ty), mask=live)
        # d out / d gate = w xhat s (1 - s), and g already holds dout w s.
        tl.store(dgate + out_at, (g * a * r[:, None] * (1.0 - s)).to(dgate.dtype.element_ty), mask=live)
    column = tl.arange(0, PADDED)
    tl.store(partial + program * channels + group * WIDTH + column, dw, mask=column < WIDTH)


@torch.library.custom_op("openling::gated_group_norm", mutates_args=())
def gated_group_norm(x: Tensor, gate: Tensor, weight_C: Tensor, eps: float, groups: int) -> Tensor:
    """x [..., C] normed in `groups` groups, weighted and gated, in x's dtype; any row strides."""
    x_NC, gate_NC, channels = as_rows(x), as_rows(gate), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width, rows = channels // groups, x_NC.shape[0]
    config = rows_config(width, backward=False)
    _gated_norm_forward[(groups * triton.cdiv(rows, config.rows),)](
        x_NC, gate_NC, weight_C, out, rows, x_NC.stride(0), gate_NC.stride(0), eps,
        groups, width, triton.next_power_of_2(width), config.rows, num_warps=config.warps,
    )  # fmt: skip
    return out


@torch.library.custom_op("openling::gated_group_norm_backward", mutates_args=())
def _gated_gradients(
    x: Tensor, gate: Tensor, weight_C: Tensor, dout: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgate, dw."""
    x_NC, gate_NC, dout_NC, channels = as_rows(x), as_rows(gate), as_rows(dout), x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    width, rows = channels // groups, x_NC.shape[0]
    config = rows_config(width, backward=True)
    programs = max(1, min(triton.cdiv(PROCESSORS * config.programs, groups), triton.cdiv(rows, config.rows)))
    partial = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    _gated_norm_backward[(groups * programs,)](
        x_NC, gate_NC, dout_NC, weight_C, dx, dgate, partial, rows,
        x_NC.stride(0), gate_NC.stride(0), dout_NC.stride(0), eps,
        groups, width, triton.next_power_of_2(width), config.rows, config.stages, num_warps=config.warps,
    )  # fmt: skip
    return dx, dgate, sum_partials(partial, weight_C.dtype)


@gated_group_norm.register_fake
def _(x: Tensor, gate: Tensor, weight_C: Tensor, eps: float, groups: int) -> Tensor:
    return x.new_empty(x.shape)


@_gated_gradients.register_fake
def _(x: Tensor, gate: Tensor, weight_C: Tensor, dout: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight_C.new_empty(weight_C.shape)


def _keep_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, weight, ctx.eps, ctx.groups = inputs
    ctx.save_for_backward(x, gate, weight)


def _gated_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *_gated_gradients(*ctx.saved_tensors, dout, ctx.eps, ctx.groups), None, None


gated_group_norm.register_autograd(_gated_gradient, setup_context=_keep_gated)
