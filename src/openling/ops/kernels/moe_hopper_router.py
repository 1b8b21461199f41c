"""The router's two matrix products for Hopper: logits, and the gradient of the router's weight.

Arguments and results are those of `moe_route.route_logits` and `route_dweight`; how a program works: `kernels.moe_hopper_parts`.
All operands come by TMA, results leave in FP32. The terms of the weight, or of dlogits, follow each other along the depth of one
sum, smallest first. Experts must come in multiples of 256, widths in multiples of 256.
Legend: N tokens, E experts, M model width, Q terms, P shares of the tokens.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from openling.ops.kernels.moe_hopper_parts import (
    B_BYTES,
    COLUMNS,
    DEPTH,
    HALF_BYTES,
    Ring,
    await_empty,
    await_start,
    described,
    init_barriers,
    launch,
    multiply,
    put_chunk,
    quarters,
    release_start,
)

LOGITS = Ring(4, 1)
DWEIGHT = Ring(4, 1)
SHARES = 8  # at 256 experts and 2048 columns: 16 tiles of 128 x 256, 128 programs


@gluon.jit
def _fill(full, empty, step, a_desc, a_row, a_column, down, b_desc, b_row, b_column, a_bufs, b_bufs, STAGES: gl.constexpr):
    """One step: A in two boxes of 64 x 64, the second `down` rows below or 64 columns to the right; B in one."""
    stage = await_empty(empty, step, STAGES)
    bar = full.index(stage)
    mbarrier.expect(bar, B_BYTES + 2 * HALF_BYTES)
    tma.async_copy_global_to_shared(b_desc, [b_row, b_column], bar, b_bufs.index(stage))
    tma.async_copy_global_to_shared(a_desc, [a_row, a_column], bar, a_bufs.index(2 * stage))
    tma.async_copy_global_to_shared(a_desc, [a_row + down, a_column + 64 - down], bar, a_bufs.index(2 * stage + 1))


@gluon.jit
def _load_logits(load, Q: gl.constexpr, STAGES: gl.constexpr):
    x_desc, terms_desc, a_bufs, b_bufs, full, empty, M, E, tiles = load
    across = E // COLUMNS
    step = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for q in gl.static_range(Q):
            for m in range(0, M, DEPTH):
                b_row = (Q - 1 - q) * E + (t % across) * COLUMNS
                _fill(full, empty, step, x_desc, (t // across) * 128, m, 64, terms_desc, b_row, m, a_bufs, b_bufs, STAGES)
                step += 1


@gluon.jit
def _load_dweight(load, STAGES: gl.constexpr):
    dlogits_desc, x_desc, a_bufs, b_bufs, full, empty, N, E, across, share, tiles = load
    step = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n_tile = t % (E // 128 * across)
        begin = t // (E // 128 * across) * share
        end = gl.minimum(begin + share, N)
        for n in range(begin, end, DEPTH):
            expert = (n_tile // across) * 128
            column = (n_tile % across) * COLUMNS
            # Rows past N of the first term are rows of the second one: their tokens, past the end of x, are zero.
            _fill(full, empty, step, dlogits_desc, N + n, expert, 0, x_desc, n, column, a_bufs, b_bufs, STAGES)
            _fill(full, empty, step + 1, dlogits_desc, n, expert, 0, x_desc, n, column, a_bufs, b_bufs, STAGES)
            step += 2


@gluon.jit
def _consume(
    shared, TURN_A: gl.constexpr, TURN_B: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr
):  # fmt: skip
    """Tile t: rows 128 (t // across) and columns 256 (t % across) of the result; every `of_share` tiles the tokens move on."""
    a_bufs, b_bufs, out_bufs, full, empty, started, out_desc, steps, N, across, of_share, share, tiles = shared
    step = 0
    await_start(started, GROUP, LEAD)
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        if TURN_A:
            left = N - t // of_share * share
            mine = 2 * gl.cdiv(gl.maximum(gl.minimum(left, share), 0), DEPTH)
        else:
            mine = steps
        acc, step = multiply(
            a_bufs, b_bufs, full, empty, started, step, mine, True, GROUP, STAGES, LEAD, TURN_A, TURN_B, False
        )  # fmt: skip
        c0, c1, c2, c3 = quarters(acc)
        row = (t // across) * 128 + 64 * GROUP
        column = (t % across) * COLUMNS
        put_chunk(out_desc, row, column, c0, out_bufs, GROUP, 0)
        put_chunk(out_desc, row, column + 64, c1, out_bufs, GROUP, 1)
        put_chunk(out_desc, row, column + 128, c2, out_bufs, GROUP, 0)
        put_chunk(out_desc, row, column + 192, c3, out_bufs, GROUP, 1)
    release_start(started, step, GROUP, LEAD)
    tma.store_wait(0)


@gluon.jit
def router_kernel(
    a_desc, b_desc, out_desc, depth, N, E, across, of_share, share, tiles,
    LOGITS: gl.constexpr, Q: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """LOGITS: a = x, b = terms. Otherwise a = dlogits, b = x, and the result has one matrix per share of the tokens."""
    dtype: gl.constexpr = a_desc.dtype
    B_SHAPE: gl.constexpr = [256, 64] if LOGITS else [64, 256]
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, B_SHAPE[0], B_SHAPE[1]], layout)
    out_bufs = gl.allocate_shared_memory(gl.float32, [4, 64, 32], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    init_barriers(full, empty, started, STAGES, False)
    shared = (
        a_bufs, b_bufs, out_bufs, full, empty, started, out_desc, Q * depth // DEPTH, N, across, of_share, share, tiles
    )  # fmt: skip
    if LOGITS:
        load = (a_desc, b_desc, a_bufs, b_bufs, full, empty, depth, E, tiles)
        gl.warp_specialize(
            [
                (_load_logits, (load, Q, STAGES)),
                (_consume, (shared, False, True, 0, STAGES, LEAD)),
                (_consume, (shared, False, True, 1, STAGES, LEAD)),
            ],
            [4, 4],
            [224, 224],
        )
    else:
        shares = (a_desc, b_desc, a_bufs, b_bufs, full, empty, N, E, across, share, tiles)
        gl.warp_specialize(
            [
                (_load_dweight, (shares, STAGES)),
                (_consume, (shared, True, False, 0, STAGES, LEAD)),
                (_consume, (shared, True, False, 1, STAGES, LEAD)),
            ],
            [4, 4],
            [224, 224],
        )


def route_logits(x_NM: Tensor, terms_QEM: Tensor, ring: Ring | None = None) -> Tensor:
    """As `moe_route.route_logits`."""
    ring = ring or LOGITS
    tokens, width = x_NM.shape
    terms, experts, _ = terms_QEM.shape
    out = torch.empty(tokens, experts, dtype=torch.float32, device=x_NM.device)
    tiles = triton.cdiv(tokens, 128) * (experts // 256)
    launch(
        router_kernel, tiles, x_NM.device, described(x_NM, 64, 64), described(terms_QEM, 256, 64), described(out, 64, 32),
        width, tokens, experts, experts // 256, tiles, tokens, tiles,
        LOGITS=True, Q=terms, STAGES=ring.stages, LEAD=ring.lead,
    )  # fmt: skip
    return out


def route_dweight(dlogits_2NE: Tensor, x_NM: Tensor, dtype: torch.dtype, ring: Ring | None = None) -> Tensor:
    """As `moe_route.route_dweight`."""
    ring = ring or DWEIGHT
    tokens, width = x_NM.shape
    experts = dlogits_2NE.shape[-1]
    share = triton.cdiv(triton.cdiv(tokens, SHARES), 64) * 64
    partial = torch.empty(SHARES, experts, width, dtype=torch.float32, device=x_NM.device)
    of_share = experts // 128 * (width // 256)
    launch(
        router_kernel, SHARES * of_share, x_NM.device, described(dlogits_2NE, 64, 64), described(x_NM, 64, 256),
        described(partial, 64, 32), 64, tokens, experts, width // 256, of_share, share, SHARES * of_share,
        LOGITS=False, Q=2, STAGES=ring.stages, LEAD=ring.lead,
    )  # fmt: skip
    return partial.sum(0).to(dtype)
