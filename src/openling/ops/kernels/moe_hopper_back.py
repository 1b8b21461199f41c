"""Gradients of the experts' weights for Hopper: d_down and d_gate_up.

Arguments and results are those of `kernels.moe_gemm`; how a program works: `kernels.moe_hopper_parts`.
Shared memory: 4 stages (192 KB) and 4 output buffers of 8 KB. M and F must be multiples of 256.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from openling.ops.kernels.moe_hopper_parts import (
    B_BYTES,
    COLUMNS,
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
    multiply,
    put_chunk,
    quarters,
    release_start,
    top_k,
)
from openling.ops.kernels.moe_sort import Sorted


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
