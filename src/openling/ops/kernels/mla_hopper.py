"""Absorbed MLA decoding on Hopper, in Gluon (Triton's lower level); the portable form and all conventions: `kernels.mla`.

Triton proper gives the score product of a 64-row block a layout in which both warpgroups compute all of it. Here each takes
half the keys of a tile, and then half the latent columns of the context, 64 x 256 FP32 accumulators in 128 registers a thread.
A tile (64 keys, 72 KB) comes by TMA into one of two buffers and is read there by the tensor cores three times: latents and
rotated rows transposed for the scores, latents as they are for the context. Its successor but one is ordered when it is done.
Shared memory: queries 72 KB, two tiles 144 KB, weights 8 KB, of 227 KB.
Legend: B sequences, T new tokens, H heads, R latent rank, r rotated dims, S rows of a page, W = T * H rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
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

ROWS = 64
TILE = 64
WARPS = 8
BUFFERS = 2
WHOLE_SLACK = gl.constexpr(4)  # as in `kernels.mla`: the merge makes the same cut
VARYING = ("length", "batch", "pieces", "piece_tiles")


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _order_tile(latent_desc, rope_desc, latent_tiles, rope_tiles, ready, buffer, row, wanted):
    """Start the copy of the tile whose first row is `row`; the buffer's barrier turns when all of it is there."""
    barrier = ready.index(buffer)
    mbarrier.expect(barrier, latent_desc.block_type.nbytes + rope_desc.block_type.nbytes, wanted)
    tma.async_copy_global_to_shared(latent_desc, [row, 0], barrier, latent_tiles.index(buffer), wanted)
    tma.async_copy_global_to_shared(rope_desc, [row, 0], barrier, rope_tiles.index(buffer), wanted)


@gluon.jit
def _tile_row(table, b, tile, end, page_rows, PAGE: gl.constexpr, TILE: gl.constexpr):
    """Row of the flattened pages at which a tile of sequence b begins; `table` points to the sequence's pages."""
    at = tile * TILE
    return b * page_rows + at if table is None else gl.load(table + at // PAGE, mask=tile < end, other=0) * page_rows + at % PAGE


@gluon.jit
def _load_queries(source, tokens_row, heads_row, block, into, T: gl.constexpr, H: gl.constexpr, LAYOUT: gl.constexpr):
    """This block's rows of [T, H, columns] into shared memory; rows past W become zero."""
    ROWS: gl.constexpr = into.shape[0]
    w = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, into.shape[1], gl.SliceLayout(0, LAYOUT))
    at = (w // H) * tokens_row + (w % H) * heads_row
    into.store(gl.load(source + at[:, None] + column[None, :], mask=(w < T * H)[:, None], other=0.0))


@gluon.jit
def _clear_rows(tile, live, LAYOUT: gl.constexpr):
    """Zero the rows from `live` on: weight 0 times the NaN of a row nobody wrote would be NaN."""
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range(tile.shape[1] // 64):
        part = tile.slice(i * 64, 64, dim=1)
        part.store(gl.where((row < live)[:, None], part.load(LAYOUT), 0.0))
    fence_async_shared()


@gluon.jit(do_not_specialize=VARYING)
def decode_kernel(
    latent_desc, rope_desc, q_latent, q_rope, table, lengths, out, partial, log_sum,
    ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, page_rows, table_b, out_b, out_t, out_h, length, batch, pieces, piece_tiles, scale_log2,
    T: gl.constexpr, H: gl.constexpr, R: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr, ROWS: gl.constexpr,
    TILE: gl.constexpr, BUFFERS: gl.constexpr, SEQUENCES: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, programs). Row w of W is token w // H, head w % H."""
    dtype: gl.constexpr = latent_desc.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, TILE // 2, 16])
    CONTEXT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, R // 2, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    # Every warp holds all sequences, so that the cut needs no shared memory.
    CUT: gl.constexpr = gl.BlockedLayout([SEQUENCES // 32 if SEQUENCES > 32 else 1], [32], [8], [0])
    queries = gl.allocate_shared_memory(dtype, [ROWS, R], gl.NVMMASharedLayout.get_default_for([ROWS, R], dtype))
    turned = gl.allocate_shared_memory(dtype, [ROWS, ROPE], gl.NVMMASharedLayout.get_default_for([ROWS, ROPE], dtype))
    weights = gl.allocate_shared_memory(dtype, [ROWS, TILE], gl.NVMMASharedLayout.get_default_for([ROWS, TILE], dtype))
    latent_tiles = gl.allocate_shared_memory(dtype, [BUFFERS, TILE, R], latent_desc.layout)
    rope_tiles = gl.allocate_shared_memory(dtype, [BUFFERS, TILE, ROPE], rope_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()

    block, me = gl.program_id(0), gl.program_id(1)
    row = gl.arange(0, SEQUENCES, CUT)
    tokens_of = gl.where(row < batch, length, 0) if lengths is None else gl.load(lengths + row, mask=row < batch, other=0)
    tiles_of = (tokens_of + TILE - 1) // TILE
    ends = gl.associative_scan(tiles_of, 0, _plus)
    programs = gl.num_programs(1)
    share = gl.maximum(gl.cdiv(gl.sum(tiles_of, 0), programs), 1)
    whole = (batch <= programs) & (gl.max(tiles_of, 0) <= share + WHOLE_SLACK)
    low = me * share
    high = gl.minimum(low + share, gl.sum(tiles_of, 0))
    if FIXED:
        first = me // pieces
        stop = first + 1
    elif whole:
        first = me
        stop = gl.minimum(me + 1, batch)
    else:
        first = gl.sum(((ends <= low) & (row < batch)).to(gl.int32), 0)
        stop = gl.where(low < high, gl.sum(((ends < high) & (row < batch)).to(gl.int32), 0) + 1, first)

    done = 0  # tiles so far: buffer and phase of the next one follow from it
    for b in range(first, stop):
        b64 = gl.cast(b, gl.int64)
        count = gl.sum(gl.where(row == b, tiles_of, 0), 0)
        tokens = gl.sum(gl.where(row == b, tokens_of, 0), 0)
        if FIXED:
            start = (me % pieces) * piece_tiles
            end = gl.minimum(start + piece_tiles, count)
        else:
            begin = gl.sum(gl.where(row == b, ends, 0), 0) - count
            start = gl.where(whole, 0, gl.maximum(low - begin, 0))
            end = gl.where(whole, count, gl.minimum(high - begin, count))
        pages = None if table is None else table + b64 * table_b
        for i in gl.static_range(BUFFERS):
            at = _tile_row(pages, b, start + i, end, page_rows, PAGE, TILE)
            _order_tile(
                latent_desc, rope_desc, latent_tiles, rope_tiles, ready, (done + i) % BUFFERS, at, start + i < end
            )  # fmt: skip
        _load_queries(q_latent + b64 * ql_b, ql_t, ql_h, block, queries, T, H, WIDE)
        _load_queries(q_rope + b64 * qr_b, qr_t, qr_h, block, turned, T, H, NARROW)
        fence_async_shared()
        w = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        seen = gl.where(w < T * H, tokens - T + 1 + w // H, 0)
        top = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, R], gl.float32, CONTEXT)
        for tile in range(start, end):
            buffer = done % BUFFERS
            c, r = latent_tiles.index(buffer), rope_tiles.index(buffer)
            ahead = _tile_row(pages, b, tile + BUFFERS, end, page_rows, PAGE, TILE)
            mbarrier.wait(ready.index(buffer), (done // BUFFERS) & 1)
            if (tile + 1) * TILE > tokens:
                _clear_rows(c, tokens - tile * TILE, NARROW)
            score = gl.zeros([ROWS, TILE], gl.float32, SCORES)
            score = warpgroup_mma(queries, c.permute([1, 0]), score, use_acc=False, is_async=True)
            score = warpgroup_mma(turned, r.permute([1, 0]), score, is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            key = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
            score = gl.where(key[None, :] < seen[:, None], score * scale_log2, float("-inf"))
            higher = gl.maximum(top, gl.max(score, 1))
            weight = gl.exp2(score - higher[:, None])
            weights.store(weight.to(dtype))
            fence_async_shared()
            fading = gl.exp2(top - higher)
            acc = acc * gl.convert_layout(fading, gl.SliceLayout(1, CONTEXT), assert_trivial=True)[:, None]
            acc = warpgroup_mma(weights, c, acc, is_async=True)
            total = total * fading + gl.sum(weight, 1)
            top = higher
            acc = warpgroup_mma_wait(0, deps=[acc])
            gl.thread_barrier()  # both warpgroups are done with the buffer
            _order_tile(latent_desc, rope_desc, latent_tiles, rope_tiles, ready, buffer, ahead, tile + BUFFERS < end)
            done += 1
        total = gl.where(total > 0, total, 1.0)
        acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, CONTEXT), assert_trivial=True)[:, None]
        v = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, CONTEXT))
        column = gl.arange(0, R, gl.SliceLayout(0, CONTEXT))
        if end - start == count:
            to = (v // H) * out_t + (v % H) * out_h
            gl.store(out + b64 * out_b + to[:, None] + column[None, :], acc.to(dtype), mask=(v < T * H)[:, None])
        elif start < end:
            slot = me.to(gl.int64) * (T * H) if FIXED else (me + b64) * (T * H)
            gl.store(partial + (slot + v)[:, None] * R + column[None, :], acc, mask=(v < T * H)[:, None])
            gl.store(log_sum + slot + w, top + gl.log2(total), mask=w < T * H)
        gl.thread_barrier()  # the queries' memory is free for the next sequence


def serves(q_latent: Tensor, latent: Tensor, rope: Tensor) -> bool:
    """Ranks that are powers of two, and rows that TMA can read: 16-byte aligned, whole rows between pages."""
    rank, turned = latent.shape[-1], rope.shape[-1]
    flat = all(x.stride(0) % x.stride(1) == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (latent, rope))
    same = latent.stride(0) * rope.stride(1) == rope.stride(0) * latent.stride(1)
    return q_latent.element_size() == 2 and rank in (128, 256, 512) and turned in (32, 64) and flat and same


def descriptor(x_PSR: Tensor, columns: int) -> TensorDescriptor:
    """Tiles of x's rows, so many columns wide, all pages in one column of rows."""
    page, row = x_PSR.stride(0), x_PSR.stride(1)
    pages, rows, width = x_PSR.shape
    block = [TILE, columns]
    bits = gl.bfloat16 if x_PSR.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, bits)
    return TensorDescriptor(x_PSR, [(pages - 1) * (page // row) + rows, width], [row, 1], block, layout)


def launch(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, table: Tensor | None, lengths: Tensor | None, out: Tensor,
    partial: Tensor, log_sum: Tensor, scale_log2: float, parts: Any, *, fixed: bool,
) -> None:  # fmt: skip
    """Fill `out` for whole sequences, `partial` and `log_sum` for pieces, as `kernels.mla.decode_kernel` does."""
    batch, new, heads, rank = q_latent.shape
    decode_kernel[(triton.cdiv(new * heads, ROWS), parts.programs)](
        descriptor(latent, rank), descriptor(rope, rope.shape[-1]), q_latent, q_rope, table, lengths, out, partial, log_sum,
        *q_latent.stride()[:3], *q_rope.stride()[:3], latent.stride(0) // latent.stride(1),
        0 if table is None else table.stride(0), *out.stride()[:3], latent.shape[1], batch, parts.pieces, parts.piece_tiles,
        scale_log2, T=new, H=heads, R=rank, ROPE=rope.shape[-1], PAGE=0 if table is None else latent.shape[1], ROWS=ROWS,
        TILE=TILE, BUFFERS=BUFFERS, SEQUENCES=max(32, triton.next_power_of_2(batch)), FIXED=fixed, num_warps=WARPS,
    )  # fmt: skip
