"""The scan of `lightning.py` written for Hopper's tensor cores, where most of the time of long sequences is spent.

Same function, same tiles; what differs is who waits for whom. Rows of the next chunk are on their way (bulk copies into the
other half of shared memory) while this one is computed, and the three products that need nothing but the state before the
chunk run together. Triton's own pipeliner does neither: it waits after every product, and issues the copies at the end of
an iteration. Gluon, which Triton carries, leaves both to the writer; it knows no other GPU and has no interpreter.

Legend: C tokens of a chunk, A columns of a and b, X output columns of a program.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

CHUNK = 64
COLUMNS = 64
HEAD_DIMS = (64, 128)
ROW_TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def _fetch(a_desc, b_desc, c_desc, start, a_at, c_at, a_tile, b_tile, c_tile, arrived, wanted):
    """Start copying one chunk's rows; `arrived` completes when all are there."""
    size: gl.constexpr = a_desc.block_type.nbytes + b_desc.block_type.nbytes + c_desc.block_type.nbytes
    mbarrier.expect(arrived, size, pred=wanted)
    tma.async_copy_global_to_shared(a_desc, [start, a_at], arrived, a_tile, pred=wanted)
    tma.async_copy_global_to_shared(b_desc, [start, a_at], arrived, b_tile, pred=wanted)
    tma.async_copy_global_to_shared(c_desc, [start, c_at], arrived, c_tile, pred=wanted)


@gluon.jit
def _forget(tile, live, rows_layout: gl.constexpr):
    """Zero the rows from `live` on: they belong to the next document, or to nobody."""
    values = tile.load(rows_layout)
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, rows_layout))
    tile.store(gl.where((row < live)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def scan_kernel(
    a_desc, b_desc, c_desc, out_desc, out, initial, final, log2_decay, bounds,
    state_row, state_column, tokens, heads, scale,
    A: gl.constexpr, WIDTH: gl.constexpr, COLUMNS: gl.constexpr, CHUNK: gl.constexpr, PACKED: gl.constexpr,
    REVERSE: gl.constexpr, HAS_INITIAL: gl.constexpr, HAS_FINAL: gl.constexpr,
):  # fmt: skip
    """Grid: (column blocks of the output, heads, sequences). See `lightning._scan` for the meaning of every quantity."""
    column, head, n = gl.program_id(0) * COLUMNS, gl.program_id(1), gl.program_id(2)
    if PACKED:
        first = gl.load(bounds + n).to(gl.int32)
        length = gl.load(bounds + n + 1).to(gl.int32) - first
    else:
        first = n * tokens
        length = tokens
    g = gl.load(log2_decay + head)
    a_at = head * A
    c_at = head * WIDTH + column
    dtype: gl.constexpr = a_desc.dtype
    product: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=product, k_width=2)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tile: gl.constexpr = a_desc.layout

    a_tiles = gl.allocate_shared_memory(dtype, [2, CHUNK, A], tile)
    b_tiles = gl.allocate_shared_memory(dtype, [2, CHUNK, A], tile)
    c_tiles = gl.allocate_shared_memory(dtype, [2, CHUNK, COLUMNS], tile)
    before = gl.allocate_shared_memory(dtype, [A, COLUMNS], tile)
    faded = gl.allocate_shared_memory(dtype, [CHUNK, COLUMNS], tile)
    result = gl.allocate_shared_memory(dtype, [CHUNK, COLUMNS], tile)
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(arrived.index(i), count=1)

    row = gl.arange(0, CHUNK, gl.SliceLayout(1, product))
    other = gl.arange(0, CHUNK, gl.SliceLayout(0, product))
    age = other[None, :] - row[:, None] if REVERSE else row[:, None] - other[None, :]
    within = gl.where(age >= 0, gl.exp2(g * gl.maximum(age, 0)) * scale, 0.0)
    faded_row = gl.arange(0, CHUNK, gl.SliceLayout(1, rows))
    lead: gl.constexpr = 0 if REVERSE else 1
    state_rows = gl.arange(0, A, gl.SliceLayout(1, product))
    state_columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, product))
    state_at = (n.to(gl.int64) * heads + head) * (A * WIDTH) + column * state_column
    state_grid = state_rows[:, None] * state_row + state_columns[None, :] * state_column
    if HAS_INITIAL:
        state = gl.load(initial + state_at + state_grid)
    else:
        state = gl.zeros([A, COLUMNS], gl.float32, product)
    nothing = gl.zeros([CHUNK, COLUMNS], gl.float32, product)
    no_scores = gl.zeros([CHUNK, CHUNK], gl.float32, product)

    chunks = (length + CHUNK - 1) // CHUNK
    start = first + (chunks - 1 if REVERSE else 0) * CHUNK
    _fetch(
        a_desc, b_desc, c_desc, start, a_at, c_at, a_tiles.index(0), b_tiles.index(0), c_tiles.index(0), arrived.index(0),
        chunks > 0,
    )  # fmt: skip
    for step in range(chunks):
        slot = step % 2
        index = chunks - 1 - step if REVERSE else step
        start = first + index * CHUNK
        live = gl.minimum(length - index * CHUNK, CHUNK)
        _fetch(
            a_desc, b_desc, c_desc, start - CHUNK if REVERSE else start + CHUNK, a_at, c_at, a_tiles.index(1 - slot),
            b_tiles.index(1 - slot), c_tiles.index(1 - slot), arrived.index(1 - slot), step + 1 < chunks,
        )  # fmt: skip
        a = a_tiles.index(slot)
        b = b_tiles.index(slot)
        c = c_tiles.index(slot)
        before.store(state.to(dtype))
        state = state * gl.exp2(g * live)
        mbarrier.wait(arrived.index(slot), (step // 2) % 2)
        if live < CHUNK:
            _forget(b, live, rows)
            _forget(c, live, rows)
        faded_rank = gl.maximum(live - 1 - faded_row if REVERSE else faded_row, 0)
        added = gl.exp2(g * gl.maximum(live - lead - faded_rank, 0)) * (scale if REVERSE else 1.0)
        faded.store((c.load(rows).to(gl.float32) * added[:, None]).to(dtype))
        fence_async_shared()

        scores = warpgroup_mma(a, b.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        carried = warpgroup_mma(a, before, nothing, use_acc=False, is_async=True)
        state = warpgroup_mma(b.permute((1, 0)), faded, state, is_async=True)
        scores = warpgroup_mma_wait(2, deps=(scores,))
        weights = gl.convert_layout((scores * within).to(dtype), operand)
        carried = warpgroup_mma_wait(1, deps=(carried,))
        rank = gl.maximum(live - 1 - row if REVERSE else row, 0)
        read = gl.exp2(g * (rank + lead)) * (1.0 if REVERSE else scale)
        answer = warpgroup_mma(weights, c, carried * read[:, None], is_async=True)
        state, answer = warpgroup_mma_wait(0, deps=(state, answer))

        if live < CHUNK:
            token = (start + row).to(gl.int64) * heads * WIDTH
            gl.store(out + token[:, None] + (c_at + other)[None, :], answer.to(dtype), mask=(row < live)[:, None])
        else:
            tma.store_wait(0)
            result.store(answer.to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [start, c_at], result)
    tma.store_wait(0)
    for i in gl.static_range(2):
        mbarrier.invalidate(arrived.index(i))
    if HAS_FINAL:
        gl.store(final + state_at + state_grid, state)


def serves(x: Tensor, key_dim: int, value_dim: int) -> bool:
    """Whether this form runs: BF16 on a Hopper GPU, head dims of 64 and 128."""
    dims = key_dim in HEAD_DIMS and value_dim in HEAD_DIMS
    return dims and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) == (9, 0)


def launch(
    a: Tensor, b: Tensor, c: Tensor, out: Tensor, g: Tensor, cu_seqlens: Tensor | None, scale: float, *, grid: tuple[int, int],
    tokens: int, initial: Tensor | None, final: Tensor | None, reverse: bool, transposed: bool,
) -> None:  # fmt: skip
    """One pass over rows [B*T, H*D]; `grid` is (heads, sequences); other arguments as in `lightning.scan`."""
    heads, sequences = grid
    width_a, width = a.shape[1] // heads, c.shape[1] // heads

    def tiles(x: Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [CHUNK, columns], ROW_TILE)

    scan_kernel[(width // COLUMNS, heads, sequences)](
        tiles(a, width_a), tiles(b, width_a), tiles(c, COLUMNS), tiles(out, COLUMNS), out,
        g if initial is None else initial, g if final is None else final, g, cu_seqlens,
        *((1, width_a) if transposed else (width, 1)), tokens, heads, scale,
        A=width_a, WIDTH=width, COLUMNS=COLUMNS, CHUNK=CHUNK, PACKED=cu_seqlens is not None, REVERSE=reverse,
        HAS_INITIAL=initial is not None, HAS_FINAL=final is not None, num_warps=4,
    )  # fmt: skip
