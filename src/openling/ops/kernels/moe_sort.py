"""Tokens sorted by expert, and rows summed back per token, without a host synchronisation and without atomics.

Every expert's rows begin at a multiple of `UNIT`, so that no tile of a grouped matrix product holds two experts; the rows that
fill up a segment have entry -1 and are zero in every product. The order within an expert is that of the tokens: results do not
depend on timing. Tables are as large as the worst case asks for, and their true length stays on the device.

Twin: the stable argsort of `ops.moe.combine_experts`. Row numbers are int32, addresses are computed in 64 bits.
Legend: N tokens, k experts per token, P = N * k entries, E experts, R rows (at most), M model width, B blocks of entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = 64
BLOCK_ENTRIES = 128  # every entry is compared with its block: small blocks, though each writes a count per expert


class Sorted(NamedTuple):
    """Where every token's rows are, and what every row and every tile of rows is.

    tiles: line 0 holds their number; line 1 + i holds expert, first row and units (1 or 2) of tile i.
    """

    counts_E: Tensor  # int32: tokens of each expert
    start_E: Tensor  # int32 [E + 1]: first row of each expert's segment, and the end of the last
    row_P: Tensor  # int32: row of entry n * k + j, the j-th choice of token n
    entry_R: Tensor  # int32: entry of every row, -1 where it only fills up a segment
    tiles: Tensor  # int32 [1 + tiles (at most), 4]

    @property
    def max_tiles(self) -> int:
        """How many tiles there can be."""
        return self.tiles.shape[0] - 1


def max_tiles(entries: int, experts: int) -> int:
    """Tiles of two units that any distribution of the entries can need."""
    return entries // (2 * UNIT) + min(experts, entries)


def max_rows(entries: int, experts: int) -> int:
    """Rows that any distribution of the entries can need."""
    return (entries + (UNIT - 1) * min(experts, entries)) // UNIT * UNIT


@triton.jit
def _count_kernel(index, counts_EB, entries, E, B, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """Program b: how many entries of block b chose each expert."""
    b = tl.program_id(0)
    at = b * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index + at, mask=at < entries, other=0).to(tl.int32)
    counts = tl.histogram(expert, EXPERTS, mask=at < entries)
    e = tl.arange(0, EXPERTS)
    tl.store(counts_EB + e * B + b, counts, mask=e < E)


@triton.jit
def _scan_kernel(counts_EB, counts_E, B, BLOCKS: tl.constexpr):
    """Program e: expert e's counts become the sums over earlier blocks, in place; the total goes to counts_E."""
    e = tl.program_id(0)
    total = 0
    for first in range(0, B, BLOCKS):
        b = first + tl.arange(0, BLOCKS)
        counts = tl.load(counts_EB + e * B + b, mask=b < B, other=0)
        tl.store(counts_EB + e * B + b, total + tl.cumsum(counts, 0) - counts, mask=b < B)
        total += tl.sum(counts, 0)
    tl.store(counts_E + e, total)


@triton.jit
def _plan_tiles(
    tiles, units, start, E, max_tiles, UNIT: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """This program's share of the table of tiles of two units; units and start: of every expert."""
    program = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    tiles_of = (units + 1) // 2
    last = tl.cumsum(tiles_of, 0)
    if program == 0:
        tl.store(tiles, tl.sum(tiles_of, 0))
    # Tile i belongs to the first expert whose tiles end behind i.
    tile = program * TILES + tl.arange(0, TILES)
    owner = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
    mine = owner[:, None] == expert[None, :]
    number = tile - tl.sum(tl.where(mine, (last - tiles_of)[None, :], 0), 1)
    row = tl.sum(tl.where(mine, start[None, :], 0), 1) + number * 2 * UNIT
    left = tl.sum(tl.where(mine, units[None, :], 0), 1) - 2 * number
    at = tiles + 4 * (1 + tile)
    live = (tile < max_tiles) & (owner < E)
    tl.store(at, owner, mask=live)
    tl.store(at + 1, row, mask=live)
    tl.store(at + 2, tl.minimum(left, 2), mask=live)


@triton.jit
def _plan_kernel(
    counts_E, start_E, tiles, entry_R, E, max_tiles,
    UNIT: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """Segments, tiles and the filling rows. Every program computes all segments and writes its share of tiles and fillings."""
    program = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    counts = tl.load(counts_E + expert, mask=expert < E, other=0)
    units = (counts + UNIT - 1) // UNIT
    start = (tl.cumsum(units, 0) - units) * UNIT
    if program == 0:
        tl.store(start_E + expert, start, mask=expert < E)
        tl.store(start_E + E, tl.sum(units, 0) * UNIT)
    _plan_tiles(tiles, units, start, E, max_tiles, UNIT, EXPERTS, TILES)

    filled = program * FILLED + tl.arange(0, FILLED)
    count = tl.load(counts_E + filled, mask=filled < E, other=0)
    begin = tl.sum(tl.where(filled[:, None] == expert[None, :], start[None, :], 0), 1)
    extra = (begin + count)[:, None] + tl.arange(0, UNIT)[None, :]
    end = begin + (count + UNIT - 1) // UNIT * UNIT
    tl.store(entry_R + extra, -1, mask=extra < end[:, None])


@triton.jit
def _place_kernel(index, counts_EB, start_E, row_P, entry_R, entries, B, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Program b gives every entry of block b its row: segment, entries of earlier blocks, rank within the block."""
    b = tl.program_id(0)
    mine = tl.arange(0, BLOCK)
    at = b * BLOCK + mine
    live = at < entries
    expert = tl.load(index + at, mask=live, other=-1).to(tl.int32)
    earlier = tl.zeros((BLOCK, PART), tl.int32)  # summed across the lanes once, not in every step
    for first in range(0, BLOCK, PART):
        other = first + tl.arange(0, PART)
        others = tl.load(index + b * BLOCK + other, mask=b * BLOCK + other < entries, other=-2).to(tl.int32)
        same = (expert[:, None] == others[None, :]) & (other[None, :] < mine[:, None])
        earlier += same.to(tl.int32)
    rank = tl.sum(earlier, 1)
    base = tl.load(start_E + expert, mask=live, other=0) + tl.load(counts_EB + expert * B + b, mask=live, other=0)
    tl.store(row_P + at, base + rank, mask=live)
    tl.store(entry_R + base + rank, at, mask=live)


def sort_tokens(index_Nk: Tensor, experts: int) -> Sorted:
    """The rows of all experts for the choices index_Nk (any integer dtype): four small launches."""
    index, device = index_Nk.contiguous(), index_Nk.device
    entries = index.numel()
    blocks = max(1, triton.cdiv(entries, BLOCK_ENTRIES))
    most = max_tiles(entries, experts)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    out = Sorted(
        ints(experts),
        ints(experts + 1),
        ints(entries),
        ints(max_rows(entries, experts)),
        ints(1 + most, 4),
    )
    counts_EB = ints(experts, blocks)
    padded = max(2, triton.next_power_of_2(experts))
    _count_kernel[(blocks,)](index, counts_EB, entries, experts, blocks, BLOCK_ENTRIES, padded, num_warps=4)
    _scan_kernel[(experts,)](counts_EB, out.counts_E, blocks, 1024, num_warps=4)
    programs = max(triton.cdiv(most, 32), triton.cdiv(experts, 4), 1)
    _plan_kernel[(programs,)](out.counts_E, out.start_E, out.tiles, out.entry_R, experts, most, UNIT, padded, 32, 4, num_warps=4)
    _place_kernel[(blocks,)](
        index, counts_EB, out.start_E, out.row_P, out.entry_R, entries, blocks, BLOCK_ENTRIES, 8, num_warps=4
    )
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Back to tokens
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _sum_kernel(rows_RM, weight_P, row_P, out_NM, M, K: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    """Program (n, block of columns): the k rows of token n, in the order of its choices, summed in FP32."""
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(row_P + n * K + j).to(tl.int64)
        value = tl.load(rows_RM + row * M + column, mask=column < M, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight_P + n * K + j)
        total += value
    tl.store(out_NM + n * M + column, total.to(out_NM.dtype.element_ty), mask=column < M)


def sum_rows(rows_RM: Tensor, row_P: Tensor, tokens: int, weight_Nk: Tensor | None = None) -> Tensor:
    """Each token's k rows, weighted where there are weights, summed in FP32 and rounded once: [N, M]."""
    width = rows_RM.shape[1]
    out = rows_RM.new_empty(tokens, width)
    top_k = row_P.numel() // max(tokens, 1)
    block = min(2048, triton.next_power_of_2(width))
    weight = row_P if weight_Nk is None else weight_Nk
    grid = (tokens, triton.cdiv(width, block))
    if tokens:
        _sum_kernel[grid](rows_RM, weight, row_P, out, width, top_k, block, weight_Nk is not None, num_warps=max(1, block // 512))
    return out


@triton.jit
def _sum_routed_kernel(
    rows_RM, row_P, dlogit_NE, weight_EM, out_NM, N, M, E,
    K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, block of tokens): the k rows of each token, and dlogit @ weight on top.

    Columns come first in the grid, so that a row's pieces are read at about the same time: far apart they cost DRAM pages anew.
    """
    n = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    n64 = n.to(tl.int64)
    live, inside = n < N, column < M
    mask = live[:, None] & inside[None, :]
    rows = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(row_P + n64 * K + j, mask=live, other=0).to(tl.int64)
        rows += tl.load(rows_RM + row[:, None] * M + column[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in range(0, E, EXPERTS):
        e = first + tl.arange(0, EXPERTS)
        dlogit = tl.load(dlogit_NE + n64[:, None] * E + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0)
        weight = tl.load(weight_EM + e[:, None] * M + column[None, :], mask=(e < E)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(dlogit, weight, total, input_precision=PRECISION)
    tl.store(out_NM + n64[:, None] * M + column[None, :], (rows + total).to(out_NM.dtype.element_ty), mask=mask)


class SumTile(NamedTuple):
    """Tokens and columns of a program of `sum_rows_routed`, and its warps."""

    tokens: int = 64
    columns: int = 64
    warps: int = 8


def sum_candidates() -> list[SumTile]:
    """Tiles worth measuring."""
    return [SumTile(), SumTile(columns=128), SumTile(32, 128, 4), SumTile(32, 128), SumTile(warps=4), SumTile(128)]


def sum_rows_routed(rows_RM: Tensor, row_P: Tensor, dlogit_NE: Tensor, weight_EM: Tensor, tile: SumTile | None = None) -> Tensor:
    """Gradient of the tokens [N, M]: through the experts (the k rows) and through the router (dlogit @ weight), rounded once."""
    tokens, experts = dlogit_NE.shape
    width = rows_RM.shape[1]
    out = rows_RM.new_empty(tokens, width)
    top_k = row_P.numel() // max(tokens, 1)
    precision = "ieee" if rows_RM.dtype == torch.float32 else "tf32"
    t = tile or SumTile()
    if tokens:
        _sum_routed_kernel[(triton.cdiv(width, t.columns), triton.cdiv(tokens, t.tokens))](
            rows_RM, row_P, dlogit_NE, weight_EM, out, tokens, width, experts, top_k, t.tokens, t.columns, 64, precision,
            num_warps=t.warps, num_stages=2,
        )  # fmt: skip
    return out


@triton.jit
def _gather_sum_kernel(parts, row_P, out_P, entries, rows, parts_of, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_P + at, mask=at < entries, other=0)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts_of):
        total += tl.load(parts + row, mask=at < entries, other=0.0)
        parts += rows
    tl.store(out_P + at, total, mask=at < entries)


def gather_sum(parts_CR: Tensor, row_P: Tensor, shape: torch.Size) -> Tensor:
    """FP32 gradient of the router's weights, [N, k]: a row's parts from all column blocks C, added in ascending order."""
    entries = row_P.numel()
    out = torch.empty(shape, dtype=torch.float32, device=row_P.device)
    if entries:
        _gather_sum_kernel[(triton.cdiv(entries, 256),)](parts_CR, row_P, out, entries, parts_CR.shape[1], parts_CR.shape[0], 256)
    return out
