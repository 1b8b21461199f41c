"""Grouped products for Hopper with tiles of 192 x 256: three units of rows by a quarter more columns per byte than 128 x 256 has.

Arguments and results are those of `kernels.moe_gemm`; the ring and its barriers: `kernels.moe_hopper_parts`. Each warpgroup
multiplies its own 64 rows by all 256 columns, and half of the columns by the third unit: 192 accumulators in registers. A stage
is 56 KB (A 3 x 8, B 32), of which there are three; 87 FLOP per byte of shared memory filled become 110, and a segment's last rows
load the weights less often. Tiles at the end of a segment have one or two units and no third part.
For gate_up, B is [g0, u0, g1, u1], 64 columns each, so that every accumulator has its partner in the same thread.
M and F must be multiples of 256. Legend: as in `kernels.moe_gemm`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from openling.ops.kernels.moe_hopper_parts import (
    B_BYTES,
    CHUNK,
    COLUMNS,
    D_ACT,
    D_X,
    DEPTH,
    DOWN,
    GATE_UP,
    GATHER,
    HALF_BYTES,
    PRODUCER_THREADS,
    PRODUCTS,
    await_empty,
    described,
    halves,
    launch,
    put,
    put_chunk,
    quarters,
    top_k,
)
from openling.ops.kernels.moe_sort import Sorted
from openling.ops.kernels.moe_swiglu import swiglu_backward

STAGES = 3
THIRD = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _multiply(
    a_bufs, b_bufs, full, empty, step, steps, units,
    GROUP: gl.constexpr, STAGES: gl.constexpr, TURN_A: gl.constexpr, TURN_B: gl.constexpr, GATHERED: gl.constexpr,
):  # fmt: skip
    """Products of one tile: [64, 256] of the warpgroup's own unit and [64, 128] of the third, and the steps so far."""
    acc = gl.zeros([64, 256], gl.float32, PRODUCTS)
    third = gl.zeros([64, 128], gl.float32, THIRD)
    if units == 3:
        for i in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            if GATHERED:
                fence_async_shared()
            a = a_bufs.index(3 * stage + GROUP)
            extra = a_bufs.index(3 * stage + 2)
            b = b_bufs.index(stage)
            if TURN_A:
                a = a.permute((1, 0))
                extra = extra.permute((1, 0))
            if TURN_B:
                part = b.slice(128 * GROUP, 128).permute((1, 0))
                b = b.permute((1, 0))
            else:
                part = b.slice(128 * GROUP, 128, dim=1)
            acc = warpgroup_mma(a, b, acc, is_async=True)
            third = warpgroup_mma(extra, part, third, is_async=True)
            acc, third = warpgroup_mma_wait(2, (acc, third))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
            step += 1
        acc, third = warpgroup_mma_wait(0, (acc, third))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=steps > 0)
    elif units > GROUP:
        for i in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            if GATHERED:
                fence_async_shared()
            a = a_bufs.index(3 * stage + GROUP)
            b = b_bufs.index(stage)
            if TURN_A:
                a = a.permute((1, 0))
            if TURN_B:
                b = b.permute((1, 0))
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, (acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
            step += 1
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=steps > 0)
    else:
        for _ in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
    return acc, third, step


@gluon.jit
def _thirds(third):
    """Left and right half of the third unit's products."""
    t0, t1 = halves(third)
    return gl.convert_layout(t0, CHUNK, assert_trivial=True), gl.convert_layout(t1, CHUNK, assert_trivial=True)


@gluon.jit
def _init(full, empty, STAGES: gl.constexpr, GATHERED: gl.constexpr):
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + PRODUCER_THREADS if GATHERED else 1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()


@gluon.jit
def _entries(entry_R, row, local, units, K: gl.constexpr, UNIT_NUMBER: gl.constexpr):
    """Tokens of one unit's rows, and which of the rows have one; a unit that the tile lacks has none."""
    entry = gl.load(entry_R + row + 64 * UNIT_NUMBER + local, mask=local < (units - UNIT_NUMBER) * 64, other=-1)
    return (entry // K).to(gl.int64), (entry >= 0)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Products over sorted rows
# ---------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _load_rows(load, KIND: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr):
    a, entry_R, tall, b0, b1, a_bufs, b_bufs, full, empty, depth, b_rows, border, across = load
    GATHERED: gl.constexpr = (KIND == GATE_UP) | (KIND == D_ACT)
    local = gl.arange(0, 64, gl.SliceLayout(1, GATHER))
    lane = gl.arange(0, 64, gl.SliceLayout(0, GATHER))
    total = gl.load(tall) * across
    step = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        line = tall + 4 * (1 + t // across)
        n = t % across
        base = gl.load(line) * b_rows
        row = gl.load(line + 1)
        units = gl.load(line + 2)
        if GATHERED:
            token0, real0 = _entries(entry_R, row, local, units, K, 0)
            token1, real1 = _entries(entry_R, row, local, units, K, 1)
            token2, real2 = _entries(entry_R, row, local, units, K, 2)
            at0 = a + token0[:, None] * depth + lane[None, :]
            at1 = a + token1[:, None] * depth + lane[None, :]
            at2 = a + token2[:, None] * depth + lane[None, :]
        for k in range(0, depth, DEPTH):
            stage = await_empty(empty, step, STAGES)
            bar = full.index(stage)
            b_buf = b_bufs.index(stage)
            if GATHERED:
                mbarrier.expect(bar, B_BYTES)
            else:
                mbarrier.expect(bar, B_BYTES + HALF_BYTES, pred=units == 1)
                mbarrier.expect(bar, B_BYTES + 2 * HALF_BYTES, pred=units == 2)
                mbarrier.expect(bar, B_BYTES + 3 * HALF_BYTES, pred=units == 3)
            if KIND == GATE_UP:
                first = base + n * 128
                tma.async_copy_global_to_shared(b0, [first, k], bar, b_buf.slice(0, 64))
                tma.async_copy_global_to_shared(b1, [first, k], bar, b_buf.slice(64, 64))
                tma.async_copy_global_to_shared(b0, [first + 64, k], bar, b_buf.slice(128, 64))
                tma.async_copy_global_to_shared(b1, [first + 64, k], bar, b_buf.slice(192, 64))
            elif KIND == DOWN:
                tma.async_copy_global_to_shared(b0, [base + n * COLUMNS, k], bar, b_buf)
            elif KIND == D_ACT:
                tma.async_copy_global_to_shared(b0, [base + k, n * COLUMNS], bar, b_buf)
            else:
                tma.async_copy_global_to_shared(b0, [base + k, n * COLUMNS], bar, b_buf, k < border)
                tma.async_copy_global_to_shared(b1, [base + k - border, n * COLUMNS], bar, b_buf, k >= border)
            if GATHERED:
                async_copy.async_copy_global_to_shared(a_bufs.index(3 * stage), at0 + k, real0)
                if units > 1:
                    async_copy.async_copy_global_to_shared(a_bufs.index(3 * stage + 1), at1 + k, real1)
                if units > 2:
                    async_copy.async_copy_global_to_shared(a_bufs.index(3 * stage + 2), at2 + k, real2)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                tma.async_copy_global_to_shared(a, [row, k], bar, a_bufs.index(3 * stage))
                tma.async_copy_global_to_shared(a, [row + 64, k], bar, a_bufs.index(3 * stage + 1), units > 1)
                tma.async_copy_global_to_shared(a, [row + 128, k], bar, a_bufs.index(3 * stage + 2), units > 2)
            step += 1


@gluon.jit
def _put_swiglu(
    out_desc, h_desc, row, column, F, g, u, out_bufs, KEEP: gl.constexpr, GROUP: gl.constexpr, PARITY: gl.constexpr
):  # fmt: skip
    """64 columns of a = silu(g) u and, where wanted, of g and u."""
    put(out_desc, row, column, g / (1.0 + gl.exp(-g)) * u, out_bufs, GROUP, PARITY)
    if KEEP:
        put(h_desc, row, column, g, out_bufs, GROUP, 1 - PARITY)
        put(h_desc, row, F + column, u, out_bufs, GROUP, PARITY)


@gluon.jit
def _consume_rows(shared, KIND: gl.constexpr, KEEP: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr):
    a_bufs, b_bufs, out_bufs, full, empty, tall, out_desc, h_desc, steps, F, across = shared
    total = gl.load(tall) * across
    step = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        line = tall + 4 * (1 + t // across)
        n = t % across
        row = gl.load(line + 1)
        units = gl.load(line + 2)
        acc, third, step = _multiply(
            a_bufs, b_bufs, full, empty, step, steps, units,
            GROUP, STAGES, False, (KIND == GATE_UP) | (KIND == DOWN), (KIND == GATE_UP) | (KIND == D_ACT),
        )  # fmt: skip
        if KIND == GATE_UP:
            tma.store_wait(0)  # an odd number of chunks went before: the next one's buffer may be the last one's
        if units > GROUP:
            c0, c1, c2, c3 = quarters(acc)
            mine = row + 64 * GROUP
            if KIND == GATE_UP:
                _put_swiglu(out_desc, h_desc, mine, n * 128, F, c0, c1, out_bufs, KEEP, GROUP, 0)
                _put_swiglu(out_desc, h_desc, mine, n * 128 + 64, F, c2, c3, out_bufs, KEEP, GROUP, 1)
            else:
                column = n * COLUMNS
                put(out_desc, mine, column, c0, out_bufs, GROUP, 0)
                put(out_desc, mine, column + 64, c1, out_bufs, GROUP, 1)
                put(out_desc, mine, column + 128, c2, out_bufs, GROUP, 0)
                put(out_desc, mine, column + 192, c3, out_bufs, GROUP, 1)
        if units == 3:
            t0, t1 = _thirds(third)
            if KIND == GATE_UP:
                _put_swiglu(out_desc, h_desc, row + 128, n * 128 + 64 * GROUP, F, t0, t1, out_bufs, KEEP, GROUP, 0)
            else:
                column = n * COLUMNS + 128 * GROUP
                put(out_desc, row + 128, column, t0, out_bufs, GROUP, 0)
                put(out_desc, row + 128, column + 64, t1, out_bufs, GROUP, 1)
    tma.store_wait(0)


@gluon.jit
def tall_rows_kernel(
    a, entry_R, tall, b0, b1, out_desc, h_desc, depth, b_rows, border, across,
    KIND: gl.constexpr, K: gl.constexpr, KEEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """gate_up, down, d_x or the product of d_act; arguments as in `moe_hopper.rows_kernel`."""
    dtype: gl.constexpr = b0.dtype
    GATHERED: gl.constexpr = (KIND == GATE_UP) | (KIND == D_ACT)
    B_SHAPE: gl.constexpr = [64, 256] if (KIND == D_X) | (KIND == D_ACT) else [256, 64]
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_bufs = gl.allocate_shared_memory(dtype, [3 * STAGES, 64, 64], layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, B_SHAPE[0], B_SHAPE[1]], layout)
    out_bufs = gl.allocate_shared_memory(dtype, [4, 64, 64], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    _init(full, empty, STAGES, GATHERED)
    load = (a, entry_R, tall, b0, b1, a_bufs, b_bufs, full, empty, depth, b_rows, border, across)
    shared = (a_bufs, b_bufs, out_bufs, full, empty, tall, out_desc, h_desc, depth // DEPTH, border, across)
    gl.warp_specialize(
        [
            (_load_rows, (load, KIND, K, STAGES)),
            (_consume_rows, (shared, KIND, KEEP, 0, STAGES)),
            (_consume_rows, (shared, KIND, KEEP, 1, STAGES)),
        ],
        [4, 4],
        [224, 224],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of the weights
# ---------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _load_weights(load, GATHER_A: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr):
    """Producer: per step 64 rows of both operands; the one that lies by token ([N, width]) is gathered."""
    tokens, entry_R, start_E, sorted_desc, a_bufs, b_bufs, full, empty, width, experts, rows, across = load
    down = gl.cdiv(rows, 192)
    local = gl.arange(0, 64, gl.SliceLayout(1, GATHER))
    lane = gl.arange(0, 64, gl.SliceLayout(0, GATHER))
    step = 0
    for t in range(gl.program_id(0), experts * down * across, gl.num_programs(0)):
        expert = t // (down * across)
        i = ((t % (down * across)) // across) * 192
        j = (t % across) * COLUMNS
        units = gl.minimum((rows - i) // 64, 3)
        begin = gl.load(start_E + expert)
        end = gl.load(start_E + expert + 1)
        column = (i if GATHER_A else j) + lane
        entry = gl.load(entry_R + begin + local, mask=begin + local < end, other=-1)
        for row in range(begin, end, DEPTH):
            ahead = gl.load(entry_R + row + 64 + local, mask=row + 64 + local < end, other=-1)
            at = tokens + (entry // K).to(gl.int64)[:, None] * width + column[None, :]
            real = (entry >= 0)[:, None]
            stage = await_empty(empty, step, STAGES)
            bar = full.index(stage)
            if GATHER_A:
                mbarrier.expect(bar, B_BYTES)
                tma.async_copy_global_to_shared(sorted_desc, [row, j], bar, b_bufs.index(stage))
                async_copy.async_copy_global_to_shared(a_bufs.index(3 * stage), at, real)
                if units > 1:
                    async_copy.async_copy_global_to_shared(a_bufs.index(3 * stage + 1), at + 64, real)
                if units > 2:
                    async_copy.async_copy_global_to_shared(a_bufs.index(3 * stage + 2), at + 128, real)
            else:
                mbarrier.expect(bar, HALF_BYTES, pred=units == 1)
                mbarrier.expect(bar, 2 * HALF_BYTES, pred=units == 2)
                mbarrier.expect(bar, 3 * HALF_BYTES, pred=units == 3)
                tma.async_copy_global_to_shared(sorted_desc, [row, i], bar, a_bufs.index(3 * stage))
                tma.async_copy_global_to_shared(sorted_desc, [row, i + 64], bar, a_bufs.index(3 * stage + 1), units > 1)
                tma.async_copy_global_to_shared(sorted_desc, [row, i + 128], bar, a_bufs.index(3 * stage + 2), units > 2)
                for q in gl.static_range(4):
                    part = b_bufs.index(stage).slice(64 * q, 64, dim=1)
                    async_copy.async_copy_global_to_shared(part, at + 64 * q, real)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            entry = ahead
            step += 1


@gluon.jit
def _put_unit(out0, out1, expert, border, at, column, value, out_bufs, GROUP: gl.constexpr, PARITY: gl.constexpr):
    """64 x 64 of the result whose rows below `border` belong to out0 and the others to out1."""
    row = expert * border + at
    if at < border:
        put_chunk(out0, row, column, value, out_bufs, GROUP, PARITY)
    else:
        put_chunk(out1, row - border, column, value, out_bufs, GROUP, PARITY)


@gluon.jit
def _consume_weights(shared, GROUP: gl.constexpr, STAGES: gl.constexpr):
    a_bufs, b_bufs, out_bufs, full, empty, start_E, out0, out1, border, experts, rows, across = shared
    down = gl.cdiv(rows, 192)
    step = 0
    for t in range(gl.program_id(0), experts * down * across, gl.num_programs(0)):
        expert = t // (down * across)
        i = ((t % (down * across)) // across) * 192
        column = (t % across) * COLUMNS
        units = gl.minimum((rows - i) // 64, 3)
        steps = (gl.load(start_E + expert + 1) - gl.load(start_E + expert)) // DEPTH
        acc, third, step = _multiply(a_bufs, b_bufs, full, empty, step, steps, units, GROUP, STAGES, True, False, True)
        if units > GROUP:
            c0, c1, c2, c3 = quarters(acc)
            at = i + 64 * GROUP
            _put_unit(out0, out1, expert, border, at, column, c0, out_bufs, GROUP, 0)
            _put_unit(out0, out1, expert, border, at, column + 64, c1, out_bufs, GROUP, 1)
            _put_unit(out0, out1, expert, border, at, column + 128, c2, out_bufs, GROUP, 0)
            _put_unit(out0, out1, expert, border, at, column + 192, c3, out_bufs, GROUP, 1)
        if units == 3:
            t0, t1 = _thirds(third)
            _put_unit(out0, out1, expert, border, i + 128, column + 128 * GROUP, t0, out_bufs, GROUP, 0)
            _put_unit(out0, out1, expert, border, i + 128, column + 128 * GROUP + 64, t1, out_bufs, GROUP, 1)
    tma.store_wait(0)


@gluon.jit
def tall_weights_kernel(
    tokens, entry_R, start_E, sorted_desc, out0, out1, width, border, experts, rows, across,
    GATHER_A: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """d_down (GATHER_A: tokens are A) and d_gate_up (tokens are B). rows: of one expert's result, in both outputs together."""
    dtype: gl.constexpr = sorted_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_bufs = gl.allocate_shared_memory(dtype, [3 * STAGES, 64, 64], layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], layout)
    out_bufs = gl.allocate_shared_memory(out0.dtype, [4, 64, out0.block_type.shape[1]], out0.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    _init(full, empty, STAGES, True)
    load = (tokens, entry_R, start_E, sorted_desc, a_bufs, b_bufs, full, empty, width, experts, rows, across)
    shared = (a_bufs, b_bufs, out_bufs, full, empty, start_E, out0, out1, border, experts, rows, across)
    gl.warp_specialize(
        [
            (_load_weights, (load, GATHER_A, K, STAGES)),
            (_consume_weights, (shared, 0, STAGES)),
            (_consume_weights, (shared, 1, STAGES)),
        ],
        [4, 4],
        [224, 224],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


def gate_up(x_NM: Tensor, s: Sorted, gate: Tensor, up: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
    """As `moe_gemm.gate_up`."""
    _, width, model = gate.shape
    rows = s.entry_R.numel()
    act, h = x_NM.new_empty(rows, width), x_NM.new_empty(rows if keep else 0, 2 * width)
    act_desc = described(act, 64, 64)
    launch(
        tall_rows_kernel, s.max_tall * (width // 128), x_NM.device, x_NM, s.entry_R, s.tall, described(gate, 64, 64),
        described(up, 64, 64), act_desc, described(h, 64, 64) if keep else act_desc, model, width, width, width // 128,
        KIND=int(GATE_UP), K=top_k(s, x_NM), KEEP=keep, STAGES=STAGES,
    )  # fmt: skip
    return act, h


def down(act_RF: Tensor, s: Sorted, down_EMF: Tensor) -> Tensor:
    """As `moe_gemm.down`."""
    _, model, width = down_EMF.shape
    out = act_RF.new_empty(act_RF.shape[0], model)
    out_desc, weight = described(out, 64, 64), described(down_EMF, 256, 64)
    launch(
        tall_rows_kernel, s.max_tall * (model // 256), out.device, described(act_RF, 64, 64), s.entry_R, s.tall, weight, weight,
        out_desc, out_desc, width, model, width, model // 256, KIND=int(DOWN), K=1, KEEP=False, STAGES=STAGES,
    )  # fmt: skip
    return out


def d_x(dh_R2F: Tensor, s: Sorted, gate: Tensor, up: Tensor) -> Tensor:
    """As `moe_gemm.d_x`."""
    _, width, model = gate.shape
    out = dh_R2F.new_empty(dh_R2F.shape[0], model)
    out_desc = described(out, 64, 64)
    launch(
        tall_rows_kernel, s.max_tall * (model // 256), out.device, described(dh_R2F, 64, 64), s.entry_R, s.tall,
        described(gate, 64, 256), described(up, 64, 256), out_desc, out_desc, 2 * width, width, width, model // 256,
        KIND=int(D_X), K=1, KEEP=False, STAGES=STAGES,
    )  # fmt: skip
    return out


def d_act(
    dout_NM: Tensor, weight_Nk: Tensor, s: Sorted, down_EMF: Tensor, h_R2F: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `moe_hopper.d_act`: the product, then back through SwiGLU."""
    _, model, width = down_EMF.shape
    p = h_R2F.new_empty(s.entry_R.numel(), width)
    p_desc, weight = described(p, 64, 64), described(down_EMF, 64, 256)
    launch(
        tall_rows_kernel, s.max_tall * (width // 256), p.device, dout_NM, s.entry_R, s.tall, weight, weight, p_desc, p_desc,
        model, model, model, width // 256, KIND=int(D_ACT), K=top_k(s, dout_NM), KEEP=False, STAGES=STAGES,
    )  # fmt: skip
    return swiglu_backward(p, weight_Nk, s, h_R2F)


def _weights(tokens: Tensor, sorted_RC: Tensor, s: Sorted, out: tuple[Tensor, Tensor], *, gather_a: bool) -> None:
    experts, border, columns = out[0].shape
    rows = border if out[0] is out[1] else 2 * border
    wide = 64 if out[0].element_size() == 2 else 32
    launch(
        tall_weights_kernel, experts * -(-rows // 192) * (columns // 256), tokens.device, tokens, s.entry_R, s.start_E,
        described(sorted_RC, 64, 256 if gather_a else 64), *(described(x, 64, wide) for x in out), tokens.shape[1], border,
        experts, rows, columns // 256, GATHER_A=gather_a, K=top_k(s, tokens), STAGES=STAGES,
    )  # fmt: skip


def d_down(dout_NM: Tensor, weighted_RF: Tensor, s: Sorted, dtype: torch.dtype) -> Tensor:
    """As `moe_gemm.d_down`."""
    out = dout_NM.new_empty(s.counts_E.numel(), dout_NM.shape[1], weighted_RF.shape[1], dtype=dtype)
    _weights(dout_NM, weighted_RF, s, (out, out), gather_a=True)
    return out


def d_gate_up(dh_R2F: Tensor, x_NM: Tensor, s: Sorted, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `moe_gemm.d_gate_up`."""
    shape = s.counts_E.numel(), dh_R2F.shape[1] // 2, x_NM.shape[1]
    dgate, dup = (x_NM.new_empty(shape, dtype=dtype) for _ in range(2))
    _weights(x_NM, dh_R2F, s, (dgate, dup), gather_a=False)
    return dgate, dup
