"""d_act in one kernel for Hopper: p = dout D and, from the registers, back through SwiGLU; nothing of p reaches memory.

Arguments and results are those of `moe_gemm.d_act`; how a program works: `kernels.moe_hopper_parts`. The forward values h come
through the ring like operands: after the last step of a tile four more stages follow, one per 64 columns, with g and u for both
warpgroups (4 x 8 KB). They are ordered long before they are needed. dh overwrites h in the stage and leaves it by TMA; the
stage is released when it has left. w a goes out through two buffers per warpgroup.
Shared memory: 4 stages 192 KB, 4 output buffers of 8 KB. M and F must be multiples of 256.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

from openling.ops.kernels.moe_hopper_parts import (
    B_BYTES,
    CHUNK,
    COLUMNS,
    DEPTH,
    GATHER,
    HALF_BYTES,
    Ring,
    await_empty,
    await_start,
    described,
    init_barriers,
    launch,
    multiply,
    quarters,
    release_start,
)
from openling.ops.kernels.moe_sort import Sorted

RING = Ring(4, 1)


@gluon.jit
def _load(load, K: gl.constexpr, STAGES: gl.constexpr):
    """Producer: tokens' gradients gathered, weights by TMA, then four stages of h."""
    dout_NM, entry_R, tiles, down_desc, h_desc, a_bufs, b_bufs, full, empty, M, F, across = load
    local = gl.arange(0, 64, gl.SliceLayout(1, GATHER))
    lane = gl.arange(0, 64, gl.SliceLayout(0, GATHER))
    total = gl.load(tiles) * across
    step = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        line = tiles + 4 * (1 + t // across)
        column = (t % across) * COLUMNS
        base = gl.load(line) * M
        row = gl.load(line + 1)
        units = gl.load(line + 2)
        entry0 = gl.load(entry_R + row + local)
        entry1 = gl.load(entry_R + row + 64 + local, mask=local < (units - 1) * 64, other=-1)
        at0 = dout_NM + (entry0 // K).to(gl.int64)[:, None] * M + lane[None, :]
        at1 = dout_NM + (entry1 // K).to(gl.int64)[:, None] * M + lane[None, :]
        real0 = (entry0 >= 0)[:, None]
        real1 = (entry1 >= 0)[:, None]
        for m in range(0, M, DEPTH):
            stage = await_empty(empty, step, STAGES)
            bar = full.index(stage)
            mbarrier.expect(bar, B_BYTES)
            tma.async_copy_global_to_shared(down_desc, [base + m, column], bar, b_bufs.index(stage))
            async_copy.async_copy_global_to_shared(a_bufs.index(2 * stage), at0 + m, real0)
            if units == 2:
                async_copy.async_copy_global_to_shared(a_bufs.index(2 * stage + 1), at1 + m, real1)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
        for i in range(4):
            stage = await_empty(empty, step, STAGES)
            bar = full.index(stage)
            h_buf = b_bufs.index(stage)
            at = column + 64 * i
            mbarrier.expect(bar, 2 * HALF_BYTES, pred=units == 1)
            mbarrier.expect(bar, 4 * HALF_BYTES, pred=units == 2)
            tma.async_copy_global_to_shared(h_desc, [row, at], bar, h_buf.slice(0, 64, dim=1))
            tma.async_copy_global_to_shared(h_desc, [row, F + at], bar, h_buf.slice(64, 64, dim=1))
            tma.async_copy_global_to_shared(h_desc, [row + 64, at], bar, h_buf.slice(128, 64, dim=1), units == 2)
            tma.async_copy_global_to_shared(h_desc, [row + 64, F + at], bar, h_buf.slice(192, 64, dim=1), units == 2)
            async_copy.mbarrier_arrive(bar, increment_count=False)  # nothing was gathered: at once
            step += 1


@gluon.jit
def _chunk(
    p, w, row, column, F, b_bufs, out_bufs, full, empty, step, dh_desc, weighted_desc,
    GROUP: gl.constexpr, STAGES: gl.constexpr, NUMBER: gl.constexpr,
):  # fmt: skip
    """Chunk NUMBER of p: dh over h in its stage, w a, and the chunk's share of dw = p . a. Releases the chunk before."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    g_buf = b_bufs.index(stage).slice(128 * GROUP, 64, dim=1)
    u_buf = b_bufs.index(stage).slice(128 * GROUP + 64, 64, dim=1)
    weighted_buf = out_bufs.index(2 * GROUP + NUMBER % 2)
    g = g_buf.load(CHUNK).to(gl.float32)
    u = u_buf.load(CHUNK).to(gl.float32)
    sigmoid = 1.0 / (1.0 + gl.exp(-g))
    silu = g * sigmoid
    act = silu * u
    dweight = gl.sum(p * act, 1)
    dact = p * w[:, None]
    g_buf.store((dact * u * (sigmoid + silu * (1.0 - sigmoid))).to(dh_desc.dtype))
    u_buf.store((dact * silu).to(dh_desc.dtype))
    # Two chunks ago this buffer was filled, and `store_wait` below has since seen it leave.
    weighted_buf.store((act * w[:, None]).to(dh_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dh_desc, [row, column], g_buf)
    tma.async_copy_shared_to_global(dh_desc, [row, F + column], u_buf)
    tma.async_copy_shared_to_global(weighted_desc, [row, column], weighted_buf)
    if NUMBER > 0:
        tma.store_wait(3)
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return dweight


@gluon.jit
def _consume(shared, GROUP: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr):
    (
        a_bufs, b_bufs, out_bufs, full, empty, started, entry_R, weight_P, tiles, dh_desc, weighted_desc, dweight_CR,
        steps, F, rows, across,
    ) = shared  # fmt: skip
    total = gl.load(tiles) * across
    local = gl.arange(0, 64, gl.SliceLayout(1, CHUNK))
    step = 0
    await_start(started, GROUP, LEAD)
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        line = tiles + 4 * (1 + t // across)
        n = t % across
        row = gl.load(line + 1) + 64 * GROUP
        live = gl.load(line + 2) > GROUP
        column = n * COLUMNS
        # A warpgroup without rows also lets the stages of h pass.
        passed = gl.where(live, steps, steps + 4)
        acc, step = multiply(
            a_bufs, b_bufs, full, empty, started, step, passed, live, GROUP, STAGES, LEAD, False, False, True
        )  # fmt: skip
        if live:
            entry = gl.load(entry_R + row + local)
            w = gl.load(weight_P + entry, mask=entry >= 0, other=0.0)
            c0, c1, c2, c3 = quarters(acc)
            dweight = _chunk(
                c0, w, row, column, F, b_bufs, out_bufs, full, empty, step, dh_desc, weighted_desc, GROUP, STAGES, 0
            )  # fmt: skip
            dweight += _chunk(
                c1, w, row, column + 64, F, b_bufs, out_bufs, full, empty, step + 1, dh_desc, weighted_desc, GROUP, STAGES, 1
            )  # fmt: skip
            dweight += _chunk(
                c2, w, row, column + 128, F, b_bufs, out_bufs, full, empty, step + 2, dh_desc, weighted_desc, GROUP, STAGES, 2
            )  # fmt: skip
            dweight += _chunk(
                c3, w, row, column + 192, F, b_bufs, out_bufs, full, empty, step + 3, dh_desc, weighted_desc, GROUP, STAGES, 3
            )  # fmt: skip
            step += 4
            gl.store(dweight_CR + n.to(gl.int64) * rows + row + local, dweight)
            tma.store_wait(0)
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    release_start(started, step, GROUP, LEAD)
    tma.store_wait(0)


@gluon.jit
def d_act_kernel(
    dout_NM, entry_R, weight_P, tiles, down_desc, h_desc, dh_desc, weighted_desc, dweight_CR, M, F, rows, across,
    K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """All of d_act."""
    dtype: gl.constexpr = down_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], layout)
    out_bufs = gl.allocate_shared_memory(dtype, [4, 64, 64], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    init_barriers(full, empty, started, STAGES, True)
    load = (dout_NM, entry_R, tiles, down_desc, h_desc, a_bufs, b_bufs, full, empty, M, F, across)
    shared = (
        a_bufs, b_bufs, out_bufs, full, empty, started, entry_R, weight_P, tiles, dh_desc, weighted_desc, dweight_CR,
        M // DEPTH, F, rows, across,
    )  # fmt: skip
    gl.warp_specialize(
        [(_load, (load, K, STAGES)), (_consume, (shared, 0, STAGES, LEAD)), (_consume, (shared, 1, STAGES, LEAD))],
        [4, 4],
        [224, 224],
    )


def d_act(
    dout_NM: Tensor, weight_Nk: Tensor, s: Sorted, down_EMF: Tensor, h_R2F: Tensor, ring: Ring | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `moe_gemm.d_act`."""
    ring = ring or RING
    _, model, width = down_EMF.shape
    rows, across = s.entry_R.numel(), width // 256
    dh, weighted = torch.empty_like(h_R2F), h_R2F.new_empty(rows, width)
    parts = torch.empty(across, rows, dtype=torch.float32, device=dh.device)
    launch(
        d_act_kernel, s.max_tiles * across, dh.device, dout_NM, s.entry_R, weight_Nk, s.tiles, described(down_EMF, 64, 256),
        described(h_R2F, 64, 64), described(dh, 64, 64), described(weighted, 64, 64), parts, model, width, rows, across,
        K=weight_Nk.shape[1], STAGES=ring.stages, LEAD=ring.lead,
    )  # fmt: skip
    return dh, weighted, parts
