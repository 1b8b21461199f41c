"""Experts in block FP8, for inference on many tokens: e4m3 products, tokens quantised on the fly.

Weights: e4m3 [E, rows, columns] with one FP32 scale per 128 x 128. Tokens and activations are quantised per row and 128 columns,
scale = largest magnitude / 448, as these weights were trained. A product over 128 columns runs in e4m3 and is then scaled and
added in FP32, because Hopper's tensor cores keep few bits of an e4m3 sum. A few tokens stay as they are: `kernels.moe_decode`.

Twin: `ops.moe.block_fp8_experts`, which quantises nothing but the weights: the difference is the quantisation of the tokens.
Legend: N tokens, k experts per token, E experts, R rows sorted by expert, M model width, F expert width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openling.ops.kernels.moe_decode import MOST_TOKENS, experts_few, list_few
from openling.ops.kernels.moe_gemm import row_tile
from openling.ops.kernels.moe_sort import UNIT, Sorted, sort_tokens, sum_rows

BLOCK = 128
LARGEST = 448.0  # of e4m3
ROWS = 128


@triton.jit
def _quantize_kernel(x_RC, quantized_RC, scale_RB, R, C, LARGEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * C + column[None, :]
    x = tl.load(x_RC + at, mask=(row < R)[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    scale = tl.where(largest > 0, largest / LARGEST, 1.0)
    value = tl.minimum(tl.maximum(x / scale[:, None], -LARGEST), LARGEST)
    tl.store(quantized_RC + at, value.to(quantized_RC.dtype.element_ty), mask=(row < R)[:, None])
    tl.store(scale_RB + row * (C // BLOCK) + tl.program_id(1), scale, mask=row < R)


def quantize_rows(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [R, C] and FP32 scales [R, C / 128]."""
    rows, columns = x_RC.shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x_RC.device)
    scales = torch.empty(rows, columns // BLOCK, dtype=torch.float32, device=x_RC.device)
    grid = (triton.cdiv(rows, 32), columns // BLOCK)
    _quantize_kernel[grid](x_RC, values, scales, rows, columns, LARGEST, 32, BLOCK, num_warps=4)
    return values, scales


@triton.jit
def _gate_up_kernel(
    x_NM, x_scale, entry_R, tiles, gate_EFM, up_EFM, gate_scale, up_scale, act_RF, M, F,
    K: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(F, COLUMNS)
    number = tl.program_id(0) // across
    if number >= tl.load(tiles):
        return
    expert, row, live = row_tile(tiles, number, ROWS, UNIT)
    entry = tl.load(entry_R + row, mask=live, other=-1)
    real = entry >= 0
    token = (entry // K).to(tl.int64)
    f = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    weight_at = (expert * F + f)[None, :] * M
    blocks = M // BLOCK
    scale_at = (expert * (F // BLOCK) + (tl.program_id(0) % across) * COLUMNS // BLOCK) * blocks
    own = tl.load(x_scale + token * blocks, mask=real, other=0.0)
    g = tl.zeros((ROWS, COLUMNS), tl.float32)
    u = tl.zeros((ROWS, COLUMNS), tl.float32)
    for b in range(blocks):
        m = b * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_NM + token[:, None] * M + m[None, :], mask=real[:, None], other=0.0)
        gate = tl.load(gate_EFM + weight_at + m[:, None])
        up = tl.load(up_EFM + weight_at + m[:, None])
        following = tl.load(x_scale + token * blocks + b + 1, mask=real & (b + 1 < blocks), other=0.0)
        g += tl.dot(x, gate) * (own * tl.load(gate_scale + scale_at + b))[:, None]
        u += tl.dot(x, up) * (own * tl.load(up_scale + scale_at + b))[:, None]
        own = following
    act = g / (1.0 + tl.exp(-g)) * u
    tl.store(act_RF + row[:, None] * F + f[None, :], act.to(act_RF.dtype.element_ty), mask=live[:, None])


@triton.jit
def _down_kernel(
    act_RF, act_scale, tiles, down_EMF, down_scale, out_RM, M, F,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(M, COLUMNS)
    number = tl.program_id(0) // across
    if number >= tl.load(tiles):
        return
    expert, row, live = row_tile(tiles, number, ROWS, UNIT)
    m = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    weight_at = (expert * M + m)[None, :] * F
    blocks = F // BLOCK
    scale_at = (expert * (M // BLOCK) + (tl.program_id(0) % across) * COLUMNS // BLOCK) * blocks
    own = tl.load(act_scale + row * blocks, mask=live, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for b in range(blocks):
        f = b * BLOCK + tl.arange(0, BLOCK)
        act = tl.load(act_RF + row[:, None] * F + f[None, :], mask=live[:, None], other=0.0)
        down = tl.load(down_EMF + weight_at + f[:, None])
        following = tl.load(act_scale + row * blocks + b + 1, mask=live & (b + 1 < blocks), other=0.0)
        total += tl.dot(act, down) * (own * tl.load(down_scale + scale_at + b))[:, None]
        own = following
    tl.store(out_RM + row[:, None] * M + m[None, :], total.to(out_RM.dtype.element_ty), mask=live[:, None])


def gate_up(
    x: tuple[Tensor, Tensor], s: Sorted, gate: Tensor, up: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """Activations [R, F] in `dtype` of tokens (values, scales)."""
    values, x_scale = x
    _, width, model = gate.shape
    act = torch.empty(s.entry_R.numel(), width, dtype=dtype, device=values.device)
    _gate_up_kernel[(s.max_tiles * triton.cdiv(width, 64),)](
        values, x_scale, s.entry_R, s.tiles, gate, up, *scales, act, model, width,
        K=s.row_P.numel() // values.shape[0], UNIT=UNIT, ROWS=ROWS, COLUMNS=64, BLOCK=BLOCK, num_warps=8, num_stages=3,
    )  # fmt: skip
    return act


def down(act: tuple[Tensor, Tensor], s: Sorted, down_EMF: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Outputs [R, M] in `dtype` of activations (values, scales)."""
    values, act_scale = act
    _, model, width = down_EMF.shape
    out = torch.empty(values.shape[0], model, dtype=dtype, device=values.device)
    _down_kernel[(s.max_tiles * triton.cdiv(model, 128),)](
        values, act_scale, s.tiles, down_EMF, scale, out, model, width,
        UNIT=UNIT, ROWS=ROWS, COLUMNS=128, BLOCK=BLOCK, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


@torch.library.custom_op("openling::moe_block_fp8_experts", mutates_args=())
def block_fp8_experts(
    x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, up: Tensor, down_EMF: Tensor, gate_scale: Tensor, up_scale: Tensor,
    down_scale: Tensor,
) -> Tensor:  # fmt: skip
    """Weighted sum of the chosen experts [N, M], without gradients."""
    x = x.contiguous()
    if x.shape[0] <= MOST_TOKENS:
        return experts_few(x, list_few(weight, index, gate.shape[0]), gate, up, down_EMF, (gate_scale, up_scale, down_scale))
    s = sort_tokens(index, gate.shape[0])
    act = gate_up(quantize_rows(x), s, gate, up, (gate_scale, up_scale), x.dtype)
    rows = down(quantize_rows(act), s, down_EMF, down_scale, x.dtype)
    return sum_rows(rows, s.row_P, x.shape[0], weight.float().contiguous())


@block_fp8_experts.register_fake
def _(
    x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, up: Tensor, down_EMF: Tensor, gate_scale: Tensor, up_scale: Tensor,
    down_scale: Tensor,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)
