"""Parts of the grouped matrix products for Hopper, in Gluon (Triton's lower level): the ring between producer and consumers.

What Triton proper does not give: loads in warps of their own that also gather tokens, and one warpgroup's output phase behind
the other's products. A program stays on its processor and walks over tiles of 128 x 256 outputs. Four producer warps fill a ring
of stages of depth 64 (A 2 x 8 KB, B 32 KB): tokens by cp.async, row by row, everything else by TMA. Two consumer warpgroups
multiply 64 rows each by the same B, with 64 x 256 accumulators in registers, and write through shared memory by TMA. A tile with
one unit of rows leaves the second warpgroup idle.

Barriers of a stage: `full` turns when the TMA bytes are there (1 arrival) and, where tokens are gathered, the copies of all 128
producer threads; `empty` turns when both warpgroups have released it. `started` lets warpgroup 0 go ahead.
Legend: as in `kernels.moe_gemm`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from openling.ops.kernels.moe_sort import Sorted

COLUMNS = gl.constexpr(256)
DEPTH = gl.constexpr(64)
HALF_BYTES = gl.constexpr(64 * 64 * 2)  # one unit of A in a stage, and one output buffer
B_BYTES = gl.constexpr(256 * 64 * 2)
PRODUCER_THREADS = gl.constexpr(128)
GATHER = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # a token's 64 columns: 8 threads, 16 bytes each
PRODUCTS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
GATE_UP, DOWN, D_ACT, D_X = (gl.constexpr(i) for i in range(4))
CHUNK = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))


class Ring(NamedTuple):
    """Stages of the ring, and how many steps warpgroup 0 starts ahead of warpgroup 1 (their output phases then alternate)."""

    stages: int = 4
    lead: int = 0


# The chosen rings.
RINGS = {
    "gate_up": Ring(3),
    "down": Ring(4, 1),
    "d_act": Ring(4, 1),
    "d_x": Ring(4, 2),
    "d_down": Ring(4, 1),
    "d_gate_up": Ring(4, 2),
}


def candidates() -> list[Ring]:
    """Rings worth measuring for a product."""
    return [Ring(), Ring(4, 1), Ring(4, 2), Ring(3)]


@gluon.jit
def await_empty(empty, step, STAGES: gl.constexpr):
    """Wait until the stage of this step is free; its number."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    return stage


@gluon.jit
def multiply(
    a_bufs, b_bufs, full, empty, started, step, steps, live,
    GROUP: gl.constexpr, STAGES: gl.constexpr, LEAD: gl.constexpr, TURN_A: gl.constexpr, TURN_B: gl.constexpr,
    GATHERED: gl.constexpr,
):  # fmt: skip
    """Products of one tile for warpgroup GROUP: [64, 256]. A warpgroup without rows only releases the stages."""
    acc = gl.zeros([64, 256], gl.float32, PRODUCTS)
    if live:
        for i in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            if GATHERED:
                fence_async_shared()  # cp.async writes as threads do, the tensor cores read through the other proxy
            a = a_bufs.index(2 * stage + GROUP)
            b = b_bufs.index(stage)
            if TURN_A:
                a = a.permute((1, 0))
            if TURN_B:
                b = b.permute((1, 0))
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, (acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
            step += 1
            if LEAD > 0 and GROUP == 0:
                mbarrier.arrive(started, count=1, pred=step == LEAD)
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=steps > 0)
    else:
        for _ in range(steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
    return acc, step


@gluon.jit
def await_start(started, GROUP: gl.constexpr, LEAD: gl.constexpr):
    """Warpgroup 1 lets warpgroup 0 go ahead, once."""
    if LEAD > 0 and GROUP == 1:
        mbarrier.wait(started, 0)


@gluon.jit
def release_start(started, step, GROUP: gl.constexpr, LEAD: gl.constexpr):
    """Warpgroup 0 had fewer than LEAD steps in all: nobody may wait for it."""
    if LEAD > 0 and GROUP == 0:
        mbarrier.arrive(started, count=1, pred=step < LEAD)


@gluon.jit
def halves(x):
    """Left and right half of the columns; no data moves."""
    return x.reshape([64, 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def quarters(acc):
    """The four 64 x 64 chunks of 64 x 256 products, from left to right."""
    low, high = halves(acc)
    c0, c1 = halves(low)
    c2, c3 = halves(high)
    return (
        gl.convert_layout(c0, CHUNK, assert_trivial=True),
        gl.convert_layout(c1, CHUNK, assert_trivial=True),
        gl.convert_layout(c2, CHUNK, assert_trivial=True),
        gl.convert_layout(c3, CHUNK, assert_trivial=True),
    )


@gluon.jit
def put(desc, row, column, value, out_bufs, GROUP: gl.constexpr, PARITY: gl.constexpr):
    """Write a chunk through one of the warpgroup's two buffers, whose last but one copy must be done."""
    buffer = out_bufs.index(2 * GROUP + PARITY)
    tma.store_wait(1)
    buffer.store(value.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [row, column], buffer)


@gluon.jit
def put_chunk(desc, row, column, value, out_bufs, GROUP: gl.constexpr, PARITY: gl.constexpr):
    """A 64 x 64 chunk: one piece, or two of 32 columns in FP32. Neighbouring chunks have different parities."""
    if desc.block_type.shape[1] == 64:
        put(desc, row, column, value, out_bufs, GROUP, PARITY)
    else:
        left, right = halves(value)
        put(desc, row, column, left, out_bufs, GROUP, 0)
        put(desc, row, column + 32, right, out_bufs, GROUP, 1)


@gluon.jit
def init_barriers(full, empty, started, STAGES: gl.constexpr, GATHERED: gl.constexpr):
    """Arrival counts of all barriers of the ring."""
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + PRODUCER_THREADS if GATHERED else 1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(started, count=1)
    fence_async_shared()


@gluon.jit
def load_rows(
    load,
    KIND: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Producer of the products over sorted rows. `a` is the tokens' pointer (gate_up, d_act) or a TMA descriptor (down, d_x)."""
    a, entry_R, tiles, b0, b1, a_bufs, b_bufs, full, empty, depth, b_rows, border, across = load
    GATHERED: gl.constexpr = (KIND == GATE_UP) | (KIND == D_ACT)
    local = gl.arange(0, 64, gl.SliceLayout(1, GATHER))
    column = gl.arange(0, 64, gl.SliceLayout(0, GATHER))
    total = gl.load(tiles) * across
    step = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        line = tiles + 4 * (1 + t // across)
        n = t % across
        base = gl.load(line) * b_rows
        row = gl.load(line + 1)
        units = gl.load(line + 2)
        if GATHERED:
            entry0 = gl.load(entry_R + row + local)
            entry1 = gl.load(entry_R + row + 64 + local, mask=local < (units - 1) * 64, other=-1)
            at0 = a + (entry0 // K).to(gl.int64)[:, None] * depth + column[None, :]
            at1 = a + (entry1 // K).to(gl.int64)[:, None] * depth + column[None, :]
            real0 = (entry0 >= 0)[:, None]
            real1 = (entry1 >= 0)[:, None]
        for k in range(0, depth, DEPTH):
            stage = await_empty(empty, step, STAGES)
            bar = full.index(stage)
            b_buf = b_bufs.index(stage)
            if GATHERED:
                mbarrier.expect(bar, B_BYTES)
            else:
                mbarrier.expect(bar, B_BYTES + HALF_BYTES, pred=units == 1)
                mbarrier.expect(bar, B_BYTES + 2 * HALF_BYTES, pred=units == 2)
            if KIND == GATE_UP:
                tma.async_copy_global_to_shared(b0, [base + n * 128, k], bar, b_buf.slice(0, 128))
                tma.async_copy_global_to_shared(b1, [base + n * 128, k], bar, b_buf.slice(128, 128))
            elif KIND == DOWN:
                tma.async_copy_global_to_shared(b0, [base + n * COLUMNS, k], bar, b_buf)
            elif KIND == D_ACT:
                tma.async_copy_global_to_shared(b0, [base + k, n * COLUMNS], bar, b_buf)
            else:
                tma.async_copy_global_to_shared(b0, [base + k, n * COLUMNS], bar, b_buf, k < border)
                tma.async_copy_global_to_shared(b1, [base + k - border, n * COLUMNS], bar, b_buf, k >= border)
            if GATHERED:
                async_copy.async_copy_global_to_shared(a_bufs.index(2 * stage), at0 + k, real0)
                if units == 2:
                    async_copy.async_copy_global_to_shared(a_bufs.index(2 * stage + 1), at1 + k, real1)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                tma.async_copy_global_to_shared(a, [row, k], bar, a_bufs.index(2 * stage))
                tma.async_copy_global_to_shared(a, [row + 64, k], bar, a_bufs.index(2 * stage + 1), units == 2)
            step += 1


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def serves(x: Tensor, width: int) -> bool:
    """Whether tokens x [N, M] and experts of this width can be multiplied here."""
    return x.element_size() == 2 and x.shape[-1] % 256 == 0 and width % 256 == 0 and x.is_cuda and _is_hopper(x.device)


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x as a matrix of rows for TMA, in boxes of rows x columns."""
    matrix = x.view(-1, x.shape[-1])
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], kind)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """One program per processor, or fewer.

    Registers are dealt out from 168 for each of 384 threads: 224 to consumer threads, 56 to producer threads.
    """
    kernel[(min(programs, processors(device)),)](*arguments, **constants, num_warps=4, maxnreg=168)


def top_k(s: Sorted, x_NM: Tensor) -> int:
    """Choices per token."""
    return s.row_P.numel() // x_NM.shape[0]
