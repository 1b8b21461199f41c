"""Grouped products of the backward pass for Hopper: d_act, which goes back through SwiGLU, and the weights' gradients.

Arguments and results are those of `kernels.moe_gemm`; how a program works: `kernels.moe_hopper_parts`.
Shared memory: d_act has 3 stages (144 KB) and 10 buffers of 8 KB, because it reads h while it multiplies; d_down and d_gate_up
4 stages (192 KB) and 4 output buffers. M and F must be multiples of 256.
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
    D_ACT,
    DEPTH,
    GATHER,
    HALF_BYTES,
    RINGS,
    Ring,
    await_empty,
    await_start,
    described,
    init_barriers,
    launch,
    load_rows,
    multiply,
    put_chunk,
    quarters,
    release_start,
    top_k,
)
from openling.ops.kernels.moe_sort import Sorted


@gluon.jit
def _order_h(h_desc, row, column, F, h_bufs, ready, GROUP: gl.constexpr, PARITY: gl.constexpr):
    """Start reading a chunk of g and of u."""
    bar = ready.index(2 * GROUP + PARITY)
    mbarrier.expect(bar, 2 * HALF_BYTES)
    tma.async_copy_global_to_shared(h_desc, [row, column], bar, h_bufs.index(4 * GROUP + 2 * PARITY))
    tma.async_copy_global_to_shared(h_desc, [row, F + column], bar, h_bufs.index(4 * GROUP + 2 * PARITY + 1))


@gluon.jit
def _swiglu_backward(
    p, w, row, column, F, h_bufs, weighted_bufs, ready, h_desc, dh_desc, weighted_desc,
    GROUP: gl.constexpr, NUMBER: gl.constexpr,
):  # fmt: skip
    """Chunk NUMBER of p = dout D: writes dh over h's buffers and w a, returns the chunk's share of dw = p . a."""
    PARITY: gl.constexpr = NUMBER % 2
    mbarrier.wait(ready.index(2 * GROUP + PARITY), NUMBER // 2)
    g_buf = h_bufs.index(4 * GROUP + 2 * PARITY)
    u_buf = h_bufs.index(4 * GROUP + 2 * PARITY + 1)
    g = g_buf.load(CHUNK).to(gl.float32)
    u = u_buf.load(CHUNK).to(gl.float32)
    sigmoid = 1.0 / (1.0 + gl.exp(-g))
    act = g * sigmoid * u
    dweight = gl.sum(p * act, 1)
    dact = p * w[:, None]
    if NUMBER > 0:
        tma.store_wait(0)  # the chunk before has left its buffers
        gl.thread_barrier()
        if NUMBER < 3:
            fence_async_shared()
            _order_h(h_desc, row, column + 64, F, h_bufs, ready, GROUP, 1 - PARITY)
    g_buf.store((dact * u * sigmoid * (1.0 + g * (1.0 - sigmoid))).to(h_desc.dtype))
    u_buf.store((dact * g * sigmoid).to(h_desc.dtype))
    weighted_bufs.index(GROUP).store((act * w[:, None]).to(h_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dh_desc, [row, column], g_buf)
    tma.async_copy_shared_to_global(dh_desc, [row, F + column], u_buf)
    tma.async_copy_shared_to_global(weighted_desc, [row, column], weighted_bufs.index(GROUP))
    return dweight


@gluon.jit
def _consume_d_act(
    shared, GROUP: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    (
        a_bufs, b_bufs, h_bufs, weighted_bufs, full, empty, ready, started, entry_R, weight_P, tiles, h_desc,
        dh_desc, weighted_desc, dweight_CR, steps, F, rows, across,
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
        if live:
            tma.store_wait(0)  # the last tile has left the buffers
            gl.thread_barrier()
            fence_async_shared()
            _order_h(h_desc, row, column, F, h_bufs, ready, GROUP, 0)
            _order_h(h_desc, row, column + 64, F, h_bufs, ready, GROUP, 1)
        acc, step = multiply(
            a_bufs, b_bufs, full, empty, started, step, steps, live, GROUP, STAGES, LEAD, False, False, True
        )  # fmt: skip
        if live:
            entry = gl.load(entry_R + row + local)
            w = gl.load(weight_P + entry, mask=entry >= 0, other=0.0)
            c0, c1, c2, c3 = quarters(acc)
            rest = (F, h_bufs, weighted_bufs, ready, h_desc, dh_desc, weighted_desc)
            dweight = _swiglu_backward(c0, w, row, column, *rest, GROUP, 0)
            dweight += _swiglu_backward(c1, w, row, column + 64, *rest, GROUP, 1)
            dweight += _swiglu_backward(c2, w, row, column + 128, *rest, GROUP, 2)
            dweight += _swiglu_backward(c3, w, row, column + 192, *rest, GROUP, 3)
            gl.store(dweight_CR + n.to(gl.int64) * rows + row + local, dweight)
    release_start(started, step, GROUP, LEAD)
    tma.store_wait(0)


@gluon.jit
def d_act_kernel(
    dout_NM, entry_R, weight_P, tiles, down_desc, h_desc, dh_desc, weighted_desc, dweight_CR, M, F, rows, across,
    K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """d_act. h_bufs: per warpgroup g and u of two chunks."""
    dtype: gl.constexpr = down_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], layout)
    h_bufs = gl.allocate_shared_memory(dtype, [8, 64, 64], layout)
    weighted_bufs = gl.allocate_shared_memory(dtype, [2, 64, 64], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    init_barriers(full, empty, started, STAGES, True)
    for i in gl.static_range(4):
        mbarrier.init(ready.index(i), count=1)
    load = (dout_NM, entry_R, tiles, down_desc, down_desc, a_bufs, b_bufs, full, empty, M, M, M, across)
    shared = (
        a_bufs, b_bufs, h_bufs, weighted_bufs, full, empty, ready, started, entry_R, weight_P, tiles, h_desc, dh_desc,
        weighted_desc, dweight_CR, M // DEPTH, F, rows, across,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (load_rows, (load, D_ACT, K, STAGES)),
            (_consume_d_act, (shared, 0, STAGES, LEAD)),
            (_consume_d_act, (shared, 1, STAGES, LEAD)),
        ],
        [4, 4],
        [224, 224],
    )


@gluon.jit
def _load_weights(
    load,
    GATHER_A: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Producer: per step 64 rows of both operands; the one that lies by token ([N, width]) is gathered."""
    tokens, entry_R, start_E, sorted_desc, a_bufs, b_bufs, full, empty, width, experts, down, across = load
    local = gl.arange(0, 64, gl.SliceLayout(1, GATHER))
    lane = gl.arange(0, 64, gl.SliceLayout(0, GATHER))
    step = 0
    for t in range(gl.program_id(0), experts * down * across, gl.num_programs(0)):
        expert = t // (down * across)
        i = (t % (down * across)) // across
        j = t % across
        begin = gl.load(start_E + expert)
        end = gl.load(start_E + expert + 1)
        column = (i * 128 if GATHER_A else j * COLUMNS) + lane
        entry = gl.load(entry_R + begin + local, mask=begin + local < end, other=-1)
        for row in range(begin, end, DEPTH):
            ahead = gl.load(entry_R + row + 64 + local, mask=row + 64 + local < end, other=-1)
            at = tokens + (entry // K).to(gl.int64)[:, None] * width + column[None, :]
            real = (entry >= 0)[:, None]
            stage = await_empty(empty, step, STAGES)
            bar = full.index(stage)
            if GATHER_A:
                mbarrier.expect(bar, B_BYTES)
                tma.async_copy_global_to_shared(sorted_desc, [row, j * COLUMNS], bar, b_bufs.index(stage))
                for q in gl.static_range(2):
                    async_copy.async_copy_global_to_shared(a_bufs.index(2 * stage + q), at + 64 * q, real)
            else:
                mbarrier.expect(bar, 2 * HALF_BYTES)
                tma.async_copy_global_to_shared(sorted_desc, [row, i * 128], bar, a_bufs.index(2 * stage))
                tma.async_copy_global_to_shared(sorted_desc, [row, i * 128 + 64], bar, a_bufs.index(2 * stage + 1))
                for q in gl.static_range(4):
                    part = b_bufs.index(stage).slice(64 * q, 64, dim=1)
                    async_copy.async_copy_global_to_shared(part, at + 64 * q, real)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            entry = ahead
            step += 1


@gluon.jit
def _consume_weights(
    shared,
    GROUP: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """Output rows below `border` of each expert go to out0, the others to out1."""
    a_bufs, b_bufs, out_bufs, full, empty, started, start_E, out0, out1, border, experts, down, across = shared
    step = 0
    await_start(started, GROUP, LEAD)
    for t in range(gl.program_id(0), experts * down * across, gl.num_programs(0)):
        expert = t // (down * across)
        i = (t % (down * across)) // across
        column = (t % across) * COLUMNS
        steps = (gl.load(start_E + expert + 1) - gl.load(start_E + expert)) // DEPTH
        acc, step = multiply(
            a_bufs, b_bufs, full, empty, started, step, steps, True, GROUP, STAGES, LEAD, True, False, True
        )  # fmt: skip
        c0, c1, c2, c3 = quarters(acc)
        row = expert * border + i * 128 + 64 * GROUP
        if i * 128 < border:
            put_chunk(out0, row, column, c0, out_bufs, GROUP, 0)
            put_chunk(out0, row, column + 64, c1, out_bufs, GROUP, 1)
            put_chunk(out0, row, column + 128, c2, out_bufs, GROUP, 0)
            put_chunk(out0, row, column + 192, c3, out_bufs, GROUP, 1)
        else:
            put_chunk(out1, row - border, column, c0, out_bufs, GROUP, 0)
            put_chunk(out1, row - border, column + 64, c1, out_bufs, GROUP, 1)
            put_chunk(out1, row - border, column + 128, c2, out_bufs, GROUP, 0)
            put_chunk(out1, row - border, column + 192, c3, out_bufs, GROUP, 1)
    release_start(started, step, GROUP, LEAD)
    tma.store_wait(0)


@gluon.jit
def weights_kernel(
    tokens, entry_R, start_E, sorted_desc, out0, out1, width, border, experts, down, across,
    GATHER_A: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr,
):  # fmt: skip
    """d_down (GATHER_A: tokens are A) and d_gate_up (tokens are B). down x across: tiles of one expert."""
    dtype: gl.constexpr = sorted_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], layout)
    out_bufs = gl.allocate_shared_memory(out0.dtype, [4, 64, out0.block_type.shape[1]], out0.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    init_barriers(full, empty, started, STAGES, True)
    load = (tokens, entry_R, start_E, sorted_desc, a_bufs, b_bufs, full, empty, width, experts, down, across)
    shared = (a_bufs, b_bufs, out_bufs, full, empty, started, start_E, out0, out1, border, experts, down, across)
    gl.warp_specialize(
        [
            (_load_weights, (load, GATHER_A, K, STAGES)),
            (_consume_weights, (shared, 0, STAGES, LEAD)),
            (_consume_weights, (shared, 1, STAGES, LEAD)),
        ],
        [4, 4],
        [224, 224],
    )


def d_act(
    dout_NM: Tensor, weight_Nk: Tensor, s: Sorted, down_EMF: Tensor, h_R2F: Tensor, ring: Ring | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `moe_gemm.d_act`."""
    ring = ring or RINGS["d_act"]
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


def _weights(tokens: Tensor, sorted_RC: Tensor, s: Sorted, out: tuple[Tensor, Tensor], *, gather_a: bool, ring: Ring) -> None:
    experts, rows, columns = out[0].shape
    width = 64 if out[0].element_size() == 2 else 32
    down, across = (rows if out[0] is out[1] else 2 * rows) // 128, columns // 256
    launch(
        weights_kernel, experts * down * across, tokens.device, tokens, s.entry_R, s.start_E,
        described(sorted_RC, 64, 256 if gather_a else 64), *(described(x, 64, width) for x in out), tokens.shape[1], rows,
        experts, down, across, GATHER_A=gather_a, K=top_k(s, tokens), STAGES=ring.stages, LEAD=ring.lead,
    )  # fmt: skip


def d_down(dout_NM: Tensor, weighted_RF: Tensor, s: Sorted, dtype: torch.dtype, ring: Ring | None = None) -> Tensor:
    """As `moe_gemm.d_down`."""
    out = dout_NM.new_empty(s.counts_E.numel(), dout_NM.shape[1], weighted_RF.shape[1], dtype=dtype)
    _weights(dout_NM, weighted_RF, s, (out, out), gather_a=True, ring=ring or RINGS["d_down"])
    return out


def d_gate_up(
    dh_R2F: Tensor, x_NM: Tensor, s: Sorted, dtype: torch.dtype, ring: Ring | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `moe_gemm.d_gate_up`."""
    shape = s.counts_E.numel(), dh_R2F.shape[1] // 2, x_NM.shape[1]
    dgate, dup = (x_NM.new_empty(shape, dtype=dtype) for _ in range(2))
    _weights(x_NM, dh_R2F, s, (dgate, dup), gather_a=False, ring=ring or RINGS["d_gate_up"])
    return dgate, dup
