"""Absorbed MLA decoding on Hopper with one task per warpgroup; function and conventions: `kernels.mla`, `kernels.mla_hopper`.

In `mla_hopper` all warps go through a tile together, and the tensor cores wait while they exponentiate. Here a tile passes
through three groups of warps that run at their own pace, joined by barriers in shared memory:

    producer (1 warp)      orders tiles by TMA into one of two buffers as soon as it is empty
    left (4 warps)         scores, softmax and weights of all 64 rows; context columns from 0 to R/2
    right (4 warps)        context columns from R/2 to R, while left is at the next tile's scores

Left alone computes scores, at full width: a product of 64 keys feeds the tensor cores from shared memory as fast as they
take it, one of 32 does not. Weights and the factor by which older context fades go to the right through shared memory.
Legend: B sequences, T new tokens, H heads, R latent rank, r rotated dims, S rows of a page, W = T * H rows.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from openling.ops.kernels import mla_hopper

ROWS = 64
TILE = 64
WARPS = 4  # of the left group; the others are added to them
WHOLE_SLACK = gl.constexpr(4)  # as in `kernels.mla`: the merge makes the same cut
VARYING = ("length", "batch", "pieces", "piece_tiles")
SCORE_PRODUCTS = gl.constexpr(3)  # that `_scores` starts


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _cut(lengths, length, batch, me, pieces, piece_tiles, TILE: gl.constexpr, SEQUENCES: gl.constexpr, FIXED: gl.constexpr):
    """This program's tiles: sequences from first to stop, tiles from low to high of all in a row; first's own begin there."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([SEQUENCES // 32], [32], [4], [0])
    row = gl.arange(0, SEQUENCES, LAYOUT)
    if FIXED:
        first = me // pieces
        low = (me % pieces) * piece_tiles
        high = low + piece_tiles
        stop = first + 1
        begin = 0
    else:
        tokens = gl.where(row < batch, length, 0) if lengths is None else gl.load(lengths + row, mask=row < batch, other=0)
        tiles = (tokens + TILE - 1) // TILE
        ends = gl.associative_scan(tiles, 0, _plus)
        total = gl.sum(tiles, 0)
        programs = gl.num_programs(1)
        share = gl.maximum(gl.cdiv(total, programs), 1)
        if (batch <= programs) & (gl.max(tiles, 0) <= share + WHOLE_SLACK):
            first = me
            stop = gl.minimum(me + 1, batch)
            low = gl.sum(gl.where(row < me, tiles, 0), 0)
            high = gl.sum(gl.where(row <= me, tiles, 0), 0)
        else:
            low = me * share
            high = gl.minimum(low + share, total)
            first = gl.sum(((ends <= low) & (row < batch)).to(gl.int32), 0)
            stop = gl.where(low < high, gl.sum(((ends < high) & (row < batch)).to(gl.int32), 0) + 1, first)
        begin = gl.sum(gl.where(row < first, tiles, 0), 0)
    return first, stop, low, high, begin


@gluon.jit
def _piece(lengths, length, b, low, high, begin, TILE: gl.constexpr):
    """Tokens and tiles of sequence b, and which of its tiles this program has: from start to end."""
    tokens = length if lengths is None else gl.load(lengths + b)
    count = gl.cdiv(tokens, TILE)
    start = gl.maximum(low - begin, 0)
    return tokens, count, start, gl.minimum(high - begin, count)


@gluon.jit
def _clear_rows(tile, live, LAYOUT: gl.constexpr):
    """Zero the rows from `live` on: weight 0 times the NaN of a row nobody wrote would be NaN."""
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range(tile.shape[1] // 64):
        part = tile.slice(i * 64, 64, dim=1)
        part.store(gl.where((row < live)[:, None], part.load(LAYOUT), 0.0))
    fence_async_shared()


@gluon.jit
def _load_queries(source, token_row, head_row, block, into, T: gl.constexpr, H: gl.constexpr, LAYOUT: gl.constexpr):
    """This block's rows of [T, H, columns] into shared memory; rows past W become zero."""
    ROWS: gl.constexpr = into.shape[0]
    w = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, into.shape[1], gl.SliceLayout(0, LAYOUT))
    at = (w // H) * token_row + (w % H) * head_row
    into.store(gl.load(source + at[:, None] + column[None, :], mask=(w < T * H)[:, None], other=0.0))


@gluon.jit
def _scores(queries_left, queries_right, queries_turned, left, right, rope):
    """Start q . key of all 64 rows and a tile's 64 keys."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    score = gl.zeros([64, 64], gl.float32, LAYOUT)
    score = warpgroup_mma(queries_left, left.permute([1, 0]), score, use_acc=False, is_async=True)
    score = warpgroup_mma(queries_right, right.permute([1, 0]), score, is_async=True)
    return warpgroup_mma(queries_turned, rope.permute([1, 0]), score, is_async=True)


@gluon.jit
def _store_half(
    acc, out, partial, slot, b64, block, column0, whole, out_b, out_t, out_h, T: gl.constexpr, H: gl.constexpr, R: gl.constexpr
):  # fmt: skip
    """A finished half of the context: to the output if the sequence is whole, else to its slot among the partials."""
    LAYOUT: gl.constexpr = acc.type.layout
    v = block * acc.shape[0] + gl.arange(0, acc.shape[0], gl.SliceLayout(1, LAYOUT))
    column = column0 + gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    if whole:
        to = (v // H) * out_t + (v % H) * out_h
        gl.store(out + b64 * out_b + to[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=(v < T * H)[:, None])
    else:
        gl.store(partial + (slot * (T * H) + v)[:, None] * R + column[None, :], acc, mask=(v < T * H)[:, None])


@gluon.jit
def _left(
    buffers, barriers, tensors, strides, cut, block, me, length, scale_log2,
    T: gl.constexpr, H: gl.constexpr, R: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    left_tiles, right_tiles, rope_tiles, queries_left, queries_right, queries_turned, weights, factor = buffers
    ready, empty, given, taken = barriers
    q_latent, q_rope, _, lengths, out, partial, log_sum = tensors
    ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, _, _, out_b, out_t, out_h = strides
    first, stop, low, high, begin = cut
    HALF: gl.constexpr = R // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    CONTEXT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    done = 0
    event = 0
    for b in range(first, stop):
        b64 = gl.cast(b, gl.int64)
        tokens, count, start, end = _piece(lengths, length, b, low, high, begin, 64)
        _load_queries(q_latent + b64 * ql_b, ql_t, ql_h, block, queries_left, T, H, WIDE)
        _load_queries(q_latent + b64 * ql_b + HALF, ql_t, ql_h, block, queries_right, T, H, WIDE)
        _load_queries(q_rope + b64 * qr_b, qr_t, qr_h, block, queries_turned, T, H, NARROW)
        fence_async_shared()
        w = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
        seen = gl.where(w < T * H, tokens - T + 1 + w // H, 0)
        top = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([64, HALF], gl.float32, CONTEXT)
        pending = warpgroup_mma_init(gl.zeros([64, 64], gl.float32, SCORES))
        if start < end:
            slot = done % 2
            mbarrier.wait(ready.index(slot), (done // 2) & 1)
            if (start + 1) * 64 > tokens:
                _clear_rows(left_tiles.index(slot), tokens - start * 64, NARROW)
            pending = _scores(
                queries_left, queries_right, queries_turned, left_tiles.index(slot), right_tiles.index(slot),
                rope_tiles.index(slot),
            )  # fmt: skip
        for tile in range(start, end):
            slot = done % 2
            score = warpgroup_mma_wait(0, deps=[pending])
            key = tile * 64 + gl.arange(0, 64, gl.SliceLayout(0, SCORES))
            score = gl.where(key[None, :] < seen[:, None], score * scale_log2, float("-inf"))
            higher = gl.maximum(top, gl.max(score, 1))
            weight = gl.exp2(score - higher[:, None])
            fading = gl.exp2(top - higher)
            low_weight = weight.to(weights.dtype)
            mbarrier.wait(taken, (event & 1) ^ 1)
            weights.store(low_weight)
            factor.store(fading)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(given)
            acc = acc * gl.convert_layout(fading, gl.SliceLayout(1, CONTEXT), assert_trivial=True)[:, None]
            operand = gl.convert_layout(low_weight, gl.DotOperandLayout(0, CONTEXT, 2))
            running = warpgroup_mma(operand, left_tiles.index(slot), acc, is_async=True)
            total = total * fading + gl.sum(weight, 1)
            top = higher
            if tile + 1 < end:
                # The next tile's scores queue up behind this one's context.
                after = (done + 1) % 2
                mbarrier.wait(ready.index(after), ((done + 1) // 2) & 1)
                if (tile + 2) * 64 > tokens:
                    _clear_rows(left_tiles.index(after), tokens - (tile + 1) * 64, NARROW)
                pending = _scores(
                    queries_left, queries_right, queries_turned, left_tiles.index(after), right_tiles.index(after),
                    rope_tiles.index(after),
                )  # fmt: skip
                acc = warpgroup_mma_wait(SCORE_PRODUCTS, deps=[running])
            else:
                pending = warpgroup_mma_init(gl.zeros([64, 64], gl.float32, SCORES))
                acc = warpgroup_mma_wait(0, deps=[running])
            gl.thread_barrier()
            mbarrier.arrive(empty.index(slot))
            done += 1
            event += 1
        total = gl.where(total > 0, total, 1.0)
        mbarrier.wait(taken, (event & 1) ^ 1)
        factor.store(1.0 / total)
        gl.thread_barrier()
        mbarrier.arrive(given)
        event += 1
        acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, CONTEXT), assert_trivial=True)[:, None]
        slot64 = gl.cast(me, gl.int64) if FIXED else me + b64
        if (end - start == count) | (start < end):
            _store_half(acc, out, partial, slot64, b64, block, 0, end - start == count, out_b, out_t, out_h, T, H, R)
            if end - start != count:
                gl.store(log_sum + slot64 * (T * H) + w, top + gl.log2(total), mask=w < T * H)
        begin += count
        gl.thread_barrier()  # the queries' memory is free for the next sequence


@gluon.jit
def _right(
    buffers, barriers, tensors, strides, cut, block, me, length,
    T: gl.constexpr, H: gl.constexpr, R: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    _, right_tiles, _, _, _, _, weights, factor = buffers
    ready, empty, given, taken = barriers
    _, _, _, lengths, out, partial, _ = tensors
    _, _, _, _, _, _, _, _, out_b, out_t, out_h = strides
    first, stop, low, high, begin = cut
    HALF: gl.constexpr = R // 2
    CONTEXT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    done = 0
    event = 0
    for b in range(first, stop):
        b64 = gl.cast(b, gl.int64)
        tokens, count, start, end = _piece(lengths, length, b, low, high, begin, 64)
        acc = gl.zeros([64, HALF], gl.float32, CONTEXT)
        for tile in range(start, end):
            slot = done % 2
            mbarrier.wait(ready.index(slot), (done // 2) & 1)
            if (tile + 1) * 64 > tokens:
                _clear_rows(right_tiles.index(slot), tokens - tile * 64, NARROW)
            mbarrier.wait(given, event & 1)
            acc = acc * factor.load(gl.SliceLayout(1, CONTEXT))[:, None]
            acc = warpgroup_mma(weights, right_tiles.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            gl.thread_barrier()
            mbarrier.arrive(taken)
            mbarrier.arrive(empty.index(slot))
            done += 1
            event += 1
        mbarrier.wait(given, event & 1)
        acc = acc * factor.load(gl.SliceLayout(1, CONTEXT))[:, None]
        gl.thread_barrier()
        mbarrier.arrive(taken)
        event += 1
        slot64 = gl.cast(me, gl.int64) if FIXED else me + b64
        if (end - start == count) | (start < end):
            _store_half(acc, out, partial, slot64, b64, block, HALF, end - start == count, out_b, out_t, out_h, T, H, R)
        begin += count


@gluon.jit
def _producer(
    descriptors, buffers, barriers, tensors, strides, cut, length, PAGE: gl.constexpr, R: gl.constexpr
):  # fmt: skip
    latent_desc, rope_desc = descriptors
    left_tiles, right_tiles, rope_tiles, _, _, _, _, _ = buffers
    ready, empty, _, _ = barriers
    _, _, table, lengths, _, _, _ = tensors
    _, _, _, _, _, _, page_rows, table_b, _, _, _ = strides
    first, stop, low, high, begin = cut
    HALF: gl.constexpr = R // 2
    size: gl.constexpr = 2 * latent_desc.block_type.nbytes + rope_desc.block_type.nbytes
    done = 0
    for b in range(first, stop):
        tokens, count, start, end = _piece(lengths, length, b, low, high, begin, 64)
        for tile in range(start, end):
            at = tile * 64
            if table is None:
                row = b * page_rows + at
            else:
                row = gl.load(table + gl.cast(b, gl.int64) * table_b + at // PAGE) * page_rows + at % PAGE
            slot = done % 2
            mbarrier.wait(empty.index(slot), ((done // 2) & 1) ^ 1)
            barrier = ready.index(slot)
            mbarrier.expect(barrier, size)
            tma.async_copy_global_to_shared(latent_desc, [row, 0], barrier, left_tiles.index(slot))
            tma.async_copy_global_to_shared(latent_desc, [row, HALF], barrier, right_tiles.index(slot))
            tma.async_copy_global_to_shared(rope_desc, [row, 0], barrier, rope_tiles.index(slot))
            done += 1
        begin += count


@gluon.jit(do_not_specialize=VARYING)
def decode_kernel(
    latent_desc, rope_desc, q_latent, q_rope, table, lengths, out, partial, log_sum,
    ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, page_rows, table_b, out_b, out_t, out_h, length, batch, pieces, piece_tiles, scale_log2,
    T: gl.constexpr, H: gl.constexpr, R: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr, SEQUENCES: gl.constexpr,
    FIXED: gl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, programs). Row w of W is token w // H, head w % H."""
    dtype: gl.constexpr = latent_desc.dtype
    HALF: gl.constexpr = R // 2
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HALF], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, ROPE], dtype)
    left_tiles = gl.allocate_shared_memory(dtype, [2, 64, HALF], latent_desc.layout)
    right_tiles = gl.allocate_shared_memory(dtype, [2, 64, HALF], latent_desc.layout)
    rope_tiles = gl.allocate_shared_memory(dtype, [2, 64, ROPE], rope_desc.layout)
    queries_left = gl.allocate_shared_memory(dtype, [64, HALF], half)
    queries_right = gl.allocate_shared_memory(dtype, [64, HALF], half)
    queries_turned = gl.allocate_shared_memory(dtype, [64, ROPE], narrow)
    weights = gl.allocate_shared_memory(dtype, [64, 64], square)
    factor = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(given, count=1)
    mbarrier.init(taken, count=1)
    fence_async_shared()
    block, me = gl.program_id(0), gl.program_id(1)
    cut = _cut(lengths, length, batch, me, pieces, piece_tiles, 64, SEQUENCES, FIXED)
    buffers = (left_tiles, right_tiles, rope_tiles, queries_left, queries_right, queries_turned, weights, factor)
    barriers = (ready, empty, given, taken)
    tensors = (q_latent, q_rope, table, lengths, out, partial, log_sum)
    strides = (ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, page_rows, table_b, out_b, out_t, out_h)
    gl.warp_specialize(
        [
            (_left, (buffers, barriers, tensors, strides, cut, block, me, length, scale_log2, T, H, R, FIXED)),
            (_right, (buffers, barriers, tensors, strides, cut, block, me, length, T, H, R, FIXED)),
            (_producer, ((latent_desc, rope_desc), buffers, barriers, tensors, strides, cut, length, PAGE, R)),
        ],
        [4, 1],
        [216, 40],
    )


def serves(q_latent: Tensor, latent: Tensor, rope: Tensor) -> bool:
    """As `mla_hopper`, for the full rank only: half of a smaller one is less than the tensor cores' widest product."""
    return latent.shape[-1] == 512 and mla_hopper.serves(q_latent, latent, rope)


def launch(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, table: Tensor | None, lengths: Tensor | None, out: Tensor,
    partial: Tensor, log_sum: Tensor, scale_log2: float, parts: Any, *, fixed: bool,
) -> None:  # fmt: skip
    """Fill `out` for whole sequences, `partial` and `log_sum` for pieces, as `kernels.mla.decode_kernel` does."""
    batch, new, heads, rank = q_latent.shape
    decode_kernel[(triton.cdiv(new * heads, ROWS), parts.programs)](
        mla_hopper.descriptor(latent, rank // 2), mla_hopper.descriptor(rope, rope.shape[-1]), q_latent, q_rope, table, lengths,
        out, partial, log_sum, *q_latent.stride()[:3], *q_rope.stride()[:3], latent.stride(0) // latent.stride(1),
        0 if table is None else table.stride(0), *out.stride()[:3], latent.shape[1], batch, parts.pieces, parts.piece_tiles,
        scale_log2, T=new, H=heads, R=rank, ROPE=rope.shape[-1], PAGE=0 if table is None else latent.shape[1],
        SEQUENCES=max(32, triton.next_power_of_2(batch)), FIXED=fixed, num_warps=WARPS,
    )  # fmt: skip
