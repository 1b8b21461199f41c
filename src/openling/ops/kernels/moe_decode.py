"""A few tokens through the experts: a stream of the weights that are hit, in five or six launches.

    logits    FP32 products without tensor cores, two experts per program, so that the router's weight comes from all processors
    choice    a warp per token (`moe_route.choose`); of one token in the plan's launch
    plan      one program lists the chosen experts once each, with the entries that chose them
    gate_up   program (listed expert, block of F): its rows of gate and up are read once, against up to 16 tokens at a time
    down      program (listed expert, block of M): likewise, FP32 outputs per entry
    sum       each token adds its k outputs in the order of its choices

Weights are the left operand of the products, so that the tokens are the short side (8 or 16). Grids are as large as the worst
case asks for; programs past the number of listed experts, which stays on the device, end at once. Every token's numbers are
computed in one fixed order that does not depend on the other tokens: results are the same whatever the batch. They differ in
rounding from those of the grouped products.

Weights may be block FP8: e4m3 values [E, rows, columns] and FP32 scales [E, rows / 128, columns / 128]. The tokens stay as they
are; a product over 128 columns is scaled in FP32. e4m3 is exact in BF16 and FP16, so this is what dequantised weights give.

Twins: `ops.moe.route`, `ops.moe.swiglu_experts`. Legend: N tokens, k experts per token, P = N * k entries (n * k + j is the j-th
choice of token n), E experts, S listed experts (at most), M model width, F expert width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openling.ops.kernels.moe_route import RouteSpec, choose, choose_block, padded_groups

MOST_TOKENS = 32
SCALE_BLOCK = 128


class Stream(NamedTuple):
    """Tile of a streamed product: rows of the weight and its depth, warps, loads in flight."""

    rows: int = 32
    depth: int = 128
    warps: int = 4
    stages: int = 4


# The chosen tiles.
GATE_UP = Stream()
DOWN = Stream(rows=64)


def candidates() -> list[Stream]:
    """Tiles worth measuring for either product."""
    return [Stream(), Stream(64), Stream(64, warps=8), Stream(64, 64, 4, 6), Stream(128, 64, 4, 5), Stream(32, 256, 4, 3)]


# ---------------------------------------------------------------------------------------------------------------------
# Router
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _logits_kernel(
    x_NM, router_EM, logits_NE, N, M, E, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    n = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for first in range(0, M, COLUMNS):
        m = first + tl.arange(0, COLUMNS)
        w = tl.load(router_EM + e[:, None] * M + m[None, :], mask=(e < E)[:, None] & (m < M)[None, :], other=0.0)
        x = tl.load(x_NM + n[:, None] * M + m[None, :], mask=(n < N)[:, None] & (m < M)[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :], 2)
    tl.store(logits_NE + n[:, None] * E + e[None, :], total, mask=(n < N)[:, None] & (e < E)[None, :])


@triton.jit
def _plan_kernel(
    logits_NE, bias_E, weight_Nk, index_Nk, slot_E, plan, N, E, scaling, line,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr,
    BIASED: tl.constexpr, GIVEN: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, S: tl.constexpr, CHOICES: tl.constexpr,
    ENTRIES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """plan: line 0 starts with the number of listed experts; line 1 + s: expert, number of its entries, the entries.

    GIVEN: the choice is there already, and only the list is made. slot_E: each listed expert's s, for the warps to share.
    """
    if not GIVEN:
        n = tl.arange(0, TOKENS)
        column = tl.arange(0, CHOICES)
        weight, index = choose_block(
            logits_NE, bias_E, n, N, E, scaling, TOP_K, GROUPS, KEPT, SIGMOID, NORM, BIASED, TOKENS, G, S, CHOICES
        )
        at = n[:, None] * TOP_K + column[None, :]
        mask = (n < N)[:, None] & (column < TOP_K)[None, :]
        tl.store(weight_Nk + at, weight, mask=mask)
        tl.store(index_Nk + at, index.to(index_Nk.dtype.element_ty), mask=mask)
        tl.debug_barrier()
    # Loaded as a plain vector: where the choice itself is reshaped to one, lanes that repeat a value lie between others, and
    # Triton 3.6 adds up the wrong lanes of that (the number of experts came out as twice a half of them).
    entry = tl.arange(0, ENTRIES)
    live = entry < N * TOP_K
    expert = tl.load(index_Nk + entry, mask=live, other=-1).to(tl.int32)
    rank = tl.zeros((ENTRIES,), tl.int32)
    count = tl.zeros((ENTRIES,), tl.int32)
    for first in range(0, ENTRIES, PART):
        other = first + tl.arange(0, PART)
        others = tl.load(index_Nk + other, mask=other < N * TOP_K, other=-2).to(tl.int32)
        same = expert[:, None] == others[None, :]
        rank += tl.sum((same & (other[None, :] < entry[:, None])).to(tl.int32), 1)
        count += tl.sum(same.to(tl.int32), 1)
    leads = live & (rank == 0)
    slot = tl.cumsum(leads.to(tl.int32), 0) - 1
    tl.store(plan, tl.sum(leads.to(tl.int32), 0))
    tl.store(plan + (1 + slot) * line, expert, mask=leads)
    tl.store(plan + (1 + slot) * line + 1, count, mask=leads)
    tl.store(slot_E + expert, slot, mask=leads)
    tl.debug_barrier()
    mine = tl.load(slot_E + expert, mask=live, other=0)
    tl.store(plan + (1 + mine) * line + 2 + rank, entry, mask=live)


class Listed(NamedTuple):
    """What a few tokens chose: weights FP32 and experts int64 [N, k], and the plan, int32 [1 + S, 2 + N]."""

    weight_Nk: Tensor
    index_Nk: Tensor
    plan: Tensor


def _list(weight: Tensor, index: Tensor, experts: int, logits: Tensor | None, bias: Tensor | None, spec: RouteSpec) -> Listed:
    tokens, top_k = index.shape
    plan = torch.empty(1 + min(experts, tokens * top_k), 2 + tokens, dtype=torch.int32, device=index.device)
    slot_E = torch.empty(experts, dtype=torch.int32, device=index.device)
    groups, members = padded_groups(experts, spec.n_group)
    given, unused = logits is None, weight
    entries = triton.next_power_of_2(tokens * top_k)
    _plan_kernel[(1,)](
        unused if logits is None else logits, unused if bias is None else bias.float(), weight, index, slot_E, plan, tokens,
        experts, spec.scaling_factor, plan.shape[1], TOP_K=top_k, GROUPS=spec.n_group, KEPT=spec.topk_group,
        SIGMOID=spec.score_function == "sigmoid", NORM=spec.norm_topk_prob, BIASED=bias is not None, GIVEN=given,
        TOKENS=triton.next_power_of_2(tokens), G=groups, S=members, CHOICES=triton.next_power_of_2(top_k),
        ENTRIES=entries, PART=min(32, entries), num_warps=1 if tokens == 1 else 8 if tokens <= 8 else 16,
    )  # fmt: skip
    return Listed(weight, index, plan)


def route_few(x_NM: Tensor, router_EM: Tensor, bias_E: Tensor | None, spec: RouteSpec) -> Listed:
    """Choice and plan for up to `MOST_TOKENS` tokens."""
    tokens, width = x_NM.shape
    experts = router_EM.shape[0]
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x_NM.device)
    block = min(8, triton.next_power_of_2(tokens))
    _logits_kernel[(triton.cdiv(experts, 2), triton.cdiv(tokens, block))](
        x_NM, router_EM.contiguous(), logits, tokens, width, experts, 2, block, 1024, num_warps=4
    )
    if tokens > 1:  # a warp per token: one program would choose for all of them in turn
        return list_few(*choose(logits, bias_E, spec, (1, 1)), experts)
    weight = torch.empty(tokens, spec.top_k, dtype=torch.float32, device=x_NM.device)
    return _list(weight, torch.empty_like(weight, dtype=torch.int64), experts, logits, bias_E, spec)


def list_few(weight_Nk: Tensor, index_Nk: Tensor, experts: int) -> Listed:
    """The plan of a choice that was made elsewhere."""
    spec = RouteSpec(index_Nk.shape[1], 1, 1, "sigmoid", False, 1.0)
    return _list(weight_Nk.float().contiguous(), index_Nk.contiguous(), experts, None, None, spec)


# ---------------------------------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _product(w, x, scale, total, SCALED: tl.constexpr, PRECISION: tl.constexpr):
    """total + scale * (w @ x^T)."""
    if SCALED:
        total += tl.dot(w.to(x.dtype), x.T, input_precision=PRECISION) * scale
    else:
        total = tl.dot(w, x.T, total, input_precision=PRECISION)
    return total


@triton.jit
def _gate_up_kernel(
    x_NM, plan, gate_EFM, up_EFM, gate_scale, up_scale, act_PF, line, M, F,
    K: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, ROWS)
    slot = tl.program_id(0) // blocks
    mine = plan + (1 + slot) * line
    listed, expert, count = tl.load(plan), tl.load(mine).to(tl.int64), tl.load(mine + 1)
    entry = tl.load(mine + 2 + tl.arange(0, TOKENS), mask=tl.arange(0, TOKENS) < line - 2, other=0)  # one latency for all four
    if slot >= listed:
        return
    first_row = (tl.program_id(0) % blocks) * ROWS
    f = first_row + tl.arange(0, ROWS)
    weight_at = (expert * F + f)[:, None] * M
    scale_at = ((expert * (F // 128) + first_row // 128) * (M // 128)).to(tl.int64)
    for chunk in range(0, count, TOKENS):
        i = chunk + tl.arange(0, TOKENS)
        x_at = x_NM + (entry // K)[:, None] * M
        g = tl.zeros((ROWS, TOKENS), tl.float32)
        u = tl.zeros((ROWS, TOKENS), tl.float32)
        g_scale = 1.0
        u_scale = 1.0
        for first in range(0, M, DEPTH):
            m = first + tl.arange(0, DEPTH)
            mask = (f < F)[:, None] & (m < M)[None, :]
            gate = tl.load(gate_EFM + weight_at + m[None, :], mask=mask, other=0.0)
            up = tl.load(up_EFM + weight_at + m[None, :], mask=mask, other=0.0)
            x = tl.load(x_at + m[None, :], mask=(i < count)[:, None] & (m < M)[None, :], other=0.0)
            if SCALED:
                g_scale = tl.load(gate_scale + scale_at + first // 128)
                u_scale = tl.load(up_scale + scale_at + first // 128)
            g = _product(gate, x, g_scale, g, SCALED, PRECISION)
            u = _product(up, x, u_scale, u, SCALED, PRECISION)
        act = g / (1.0 + tl.exp(-g)) * u
        at = act_PF + entry[None, :] * F + f[:, None]
        tl.store(at, act.to(act_PF.dtype.element_ty), mask=(i < count)[None, :] & (f < F)[:, None])
        entry = tl.load(mine + 2 + TOKENS + i, mask=TOKENS + i < count, other=0)


@triton.jit
def _down_kernel(
    act_PF, plan, down_EMF, down_scale, out_PM, line, M, F,
    SCALED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, ROWS)
    slot = tl.program_id(0) // blocks
    mine = plan + (1 + slot) * line
    listed, expert, count = tl.load(plan), tl.load(mine).to(tl.int64), tl.load(mine + 1)
    entry = tl.load(mine + 2 + tl.arange(0, TOKENS), mask=tl.arange(0, TOKENS) < line - 2, other=0)  # one latency for all four
    if slot >= listed:
        return
    first_row = (tl.program_id(0) % blocks) * ROWS
    m = first_row + tl.arange(0, ROWS)
    weight_at = (expert * M + m)[:, None] * F
    scale_at = ((expert * (M // 128) + first_row // 128) * (F // 128)).to(tl.int64)
    for chunk in range(0, count, TOKENS):
        i = chunk + tl.arange(0, TOKENS)
        total = tl.zeros((ROWS, TOKENS), tl.float32)
        scale = 1.0
        for first in range(0, F, DEPTH):
            f = first + tl.arange(0, DEPTH)
            down = tl.load(down_EMF + weight_at + f[None, :], mask=(m < M)[:, None] & (f < F)[None, :], other=0.0)
            act = tl.load(act_PF + entry[:, None] * F + f[None, :], mask=(i < count)[:, None] & (f < F)[None, :], other=0.0)
            if SCALED:
                scale = tl.load(down_scale + scale_at + first // 128)
            total = _product(down, act, scale, total, SCALED, PRECISION)
        tl.store(out_PM + entry[None, :] * M + m[:, None], total, mask=(i < count)[None, :] & (m < M)[:, None])
        entry = tl.load(mine + 2 + TOKENS + i, mask=TOKENS + i < count, other=0)


@triton.jit
def _sum_kernel(out_PM, weight_Nk, out_NM, M, K: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        total += tl.load(weight_Nk + n * K + j) * tl.load(out_PM + (n * K + j) * M + m, mask=m < M, other=0.0)
    tl.store(out_NM + n * M + m, total.to(out_NM.dtype.element_ty), mask=m < M)


def experts_few(
    x_NM: Tensor, listed: Listed, gate: Tensor, up: Tensor, down: Tensor, scales: tuple[Tensor, Tensor, Tensor] | None = None,
    tiles: tuple[Stream, Stream] | None = None,
) -> Tensor:  # fmt: skip
    """Weighted sum of the listed experts [N, M]; `scales`: of block-FP8 gate, up and down."""
    tokens, model = x_NM.shape
    width, top_k = gate.shape[1], listed.index_Nk.shape[1]
    for w in (gate, up, down):
        if not w.is_contiguous():
            raise ValueError(f"the experts' weights must be contiguous, got strides {w.stride()}")
    slots, line = listed.plan.shape[0] - 1, listed.plan.shape[1]
    first, second = tiles or (GATE_UP, DOWN)
    if scales is not None:
        first, second = (t._replace(depth=SCALE_BLOCK) for t in (first, second))
    act = x_NM.new_empty(tokens * top_k, width)
    each = torch.empty(tokens * top_k, model, dtype=torch.float32, device=x_NM.device)
    out = torch.empty_like(x_NM)
    scaled = scales is not None
    gate_scale, up_scale, down_scale = scales or (each, each, each)
    short: dict[str, Any] = {"TOKENS": 16, "PRECISION": "ieee" if x_NM.dtype == torch.float32 else "tf32"}
    _gate_up_kernel[(slots * triton.cdiv(width, first.rows),)](
        x_NM, listed.plan, gate, up, gate_scale, up_scale, act, line, model, width,
        K=top_k, SCALED=scaled, ROWS=first.rows, DEPTH=first.depth, **short, num_warps=first.warps, num_stages=first.stages,
    )  # fmt: skip
    _down_kernel[(slots * triton.cdiv(model, second.rows),)](
        act, listed.plan, down, down_scale, each, line, model, width,
        SCALED=scaled, ROWS=second.rows, DEPTH=second.depth, **short, num_warps=second.warps, num_stages=second.stages,
    )  # fmt: skip
    block = min(512, triton.next_power_of_2(model))
    _sum_kernel[(tokens, triton.cdiv(model, block))](each, listed.weight_Nk, out, model, top_k, block, num_warps=4)
    return out
