"""Absorbed MLA decoding on NVIDIA GPUs; twin: the middle of `openling.ops.attention.absorbed_attention`.

    context[b, t, h] = softmax over keys s of (scale * (q_latent . c_s + q_rope . r_s)) . c_s,     T <= 4 new tokens, causal

A key is its latent row c and its rotated row r, both shared by all heads, so a tile of keys is read once for up to 64 rows
(token, head), as key and as value. The sequences' tiles are cut into pieces; every piece leaves a normalised partial context
and the log2 of its softmax denominator, and `merge_kernel` adds them up in order. No atomics: results repeat bitwise.

How the tiles are cut (`split_tokens`):
  0   evenly: the tiles of all sequences in a row, one equal run per program, whatever the lengths. Best balanced, fewest
      partials; the cut, and with it the last bit of a sequence's result, depends on the batch it is in.
  n   after every n tokens of a sequence: its result is the same bit for bit whatever else is in the batch.

The cut is made in the kernel from lengths on the device: no host sync, and one CUDA graph serves all lengths.
Rows come from pages [P, S, R] by a block table [B, pages], or without a table from one buffer [B, S, R] per batch.
Legend: B sequences, T new tokens, H heads, R latent rank, r rotated dims, P pages, S rows of a page, W = T * H rows.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
MAX_NEW_TOKENS = 4
# Arguments that change from token to token: no variant of a kernel is compiled for a multiple of 16.
VARYING = ("length", "batch", "pieces", "piece_tiles")
# A sequence may be this many tiles longer than an even share and still stay whole: about what a cut costs, which is reading
# the queries again, writing a partial context of 128 KB and reading it back.
WHOLE_SLACK = tl.constexpr(4)


class Config(NamedTuple):
    """One launch of the portable kernel: rows of a program, keys of a tile, warps, load stages in flight."""

    rows: int
    tile: int
    warps: int
    stages: int


@triton.jit
def _cut(lengths, length, batch, programs, TILE: tl.constexpr, SEQUENCES: tl.constexpr):
    """The even cut: tiles of each sequence, running ends of them, tiles per program, and whether sequences stay whole."""
    row = tl.arange(0, SEQUENCES)
    tokens = tl.where(row < batch, length, 0) if lengths is None else tl.load(lengths + row, mask=row < batch, other=0)
    tiles = (tokens + TILE - 1) // TILE
    share = tl.maximum(tl.cdiv(tl.sum(tiles, 0), programs), 1)
    whole = (batch <= programs) & (tl.max(tiles, 0) <= share + WHOLE_SLACK)
    return row, tiles, tl.cumsum(tiles, 0), share, whole


@triton.jit(do_not_specialize=VARYING)
def decode_kernel(
    q_latent, q_rope, latent, rope, table, lengths, out, partial, log_sum,
    ql_b, ql_t, ql_h, qr_b, qr_t, qr_h, latent_page, latent_row, rope_page, rope_row, table_b, out_b, out_t, out_h,
    length, batch, pieces, piece_tiles, scale_log2,
    T: tl.constexpr, H: tl.constexpr, R: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, R_PAD: tl.constexpr, ROPE_PAD: tl.constexpr, SEQUENCES: tl.constexpr, FIXED: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, programs). Row w of W is token w // H, head w % H."""
    me = tl.program_id(1)
    w = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, h, real = w // H, w % H, w < T * H
    column, turned = tl.arange(0, R_PAD), tl.arange(0, ROPE_PAD)
    latent_mask, rope_mask = (column < R)[None, :], (turned < ROPE)[None, :]
    row, tiles, ends, share, whole = _cut(lengths, length, batch, tl.num_programs(1), TILE, SEQUENCES)
    if FIXED:
        first = me // pieces
        stop = first + 1
    else:
        low = me * share
        high = tl.minimum(low + share, tl.sum(tiles, 0))
        first = tl.sum(((ends <= low) & (row < batch)).to(tl.int32), 0)
        stop = tl.where(low < high, tl.sum(((ends < high) & (row < batch)).to(tl.int32), 0) + 1, first)
        if whole:
            first = me
            stop = tl.minimum(me + 1, batch)
    for b in range(first, stop):
        b64 = tl.cast(b, tl.int64)
        count = tl.sum(tl.where(row == b, tiles, 0), 0)
        tokens = length if lengths is None else tl.load(lengths + b)
        if FIXED:
            start = (me % pieces) * piece_tiles
            end = tl.minimum(start + piece_tiles, count)
        else:
            begin = tl.sum(tl.where(row == b, ends, 0), 0) - count
            start = tl.where(whole, 0, tl.maximum(low - begin, 0))
            end = tl.where(whole, count, tl.minimum(high - begin, count))
        q_at = q_latent + b64 * ql_b + t[:, None] * ql_t + h[:, None] * ql_h + column[None, :]
        q = tl.load(q_at, mask=real[:, None] & latent_mask, other=0.0)
        qr_at = q_rope + b64 * qr_b + t[:, None] * qr_t + h[:, None] * qr_h + turned[None, :]
        qr = tl.load(qr_at, mask=real[:, None] & rope_mask, other=0.0)
        seen = tl.where(real, tokens - T + 1 + t, 0)
        top = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, R_PAD], tl.float32)
        for tile in tl.range(start, end, num_stages=STAGES):
            key = tile * TILE + tl.arange(0, TILE)
            if table is None:
                page = b64
                inside = key
            else:
                page = tl.load(table + b64 * table_b + tile * TILE // PAGE).to(tl.int64)
                inside = key % PAGE
            # Rows behind the sequence's end are somebody else's, or nobody's and perhaps NaN: never read.
            live = (key < tokens)[:, None]
            c = tl.load(latent + page * latent_page + inside[:, None] * latent_row + column[None, :], live & latent_mask, 0.0)
            r = tl.load(rope + page * rope_page + inside[:, None] * rope_row + turned[None, :], live & rope_mask, 0.0)
            score = tl.dot(q, tl.trans(c), input_precision=PRECISION)
            score = tl.dot(qr, tl.trans(r), score, input_precision=PRECISION) * scale_log2
            score = tl.where(key[None, :] < seen[:, None], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            fading = tl.exp2(top - higher)
            total = total * fading + tl.sum(weight, 1)
            acc = tl.dot(weight.to(c.dtype), c, acc * fading[:, None], input_precision=PRECISION)
            top = higher
        # A row that sees none of these keys adds zeros of weight 2^-1e30.
        total = tl.where(total > 0, total, 1.0)
        acc = acc / total[:, None]
        stored = real[:, None] & latent_mask
        if end - start == count:
            to = out + b64 * out_b + t[:, None] * out_t + h[:, None] * out_h + column[None, :]
            tl.store(to, acc.to(out.dtype.element_ty), mask=stored)
        elif start < end:
            slot = (me if FIXED else me + b64).to(tl.int64) * (T * H) + w
            tl.store(partial + slot[:, None] * R + column[None, :], acc, mask=stored)
            tl.store(log_sum + slot, top + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    partial, log_sum, out, lengths, length, batch, programs, pieces, piece_tiles, out_b, out_t, out_h,
    T: tl.constexpr, H: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, SEQUENCES: tl.constexpr, FIXED: tl.constexpr,
    SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (column blocks, programs that share a sequence's rows, sequences). Whole sequences are in `out` already."""
    b = tl.program_id(2)
    b64 = b.to(tl.int64)
    row, tiles, ends, share, whole = _cut(lengths, length, batch, programs, TILE, SEQUENCES)
    count = tl.sum(tl.where(row == b, tiles, 0), 0)
    if FIXED:
        first = b64 * pieces
        splits = tl.cdiv(count, piece_tiles)
    else:
        end = tl.sum(tl.where(row == b, ends, 0), 0)
        program = (end - count) // share
        first = program + b64
        splits = tl.where(whole, 1, (end - 1) // share - program + 1)
    splits = tl.where(count == 0, 0, splits)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if splits != 1:
        for w in range(tl.program_id(1), T * H, tl.num_programs(1)):
            top = -1e30
            total = 0.0
            acc = tl.zeros([COLUMNS], tl.float32)
            for done in range(0, splits, SPLITS):
                split = done + tl.arange(0, SPLITS)
                slot = (first + split) * (T * H) + w
                log2_sum = tl.load(log_sum + slot, mask=split < splits, other=float("-inf"))
                mask = (split < splits)[:, None] & (column < R)[None, :]
                context = tl.load(partial + slot[:, None] * R + column[None, :], mask=mask, other=0.0)
                higher = tl.maximum(top, tl.max(log2_sum, 0))
                weight = tl.exp2(log2_sum - higher)
                fading = tl.exp2(top - higher)
                acc = acc * fading + tl.sum(context * weight[:, None], 0)
                total = total * fading + tl.sum(weight, 0)
                top = higher
            # No split at all, an empty sequence, leaves total at 0 and the context at zero.
            acc = acc / tl.where(total > 0, total, 1.0)
            at = out + b64 * out_b + (w // H) * out_t + (w % H) * out_h + column
            tl.store(at, acc.to(out.dtype.element_ty), mask=column < R)


class Cut(NamedTuple):
    """The host's side of a cut: programs per block of rows, slots for partials, pieces per sequence, tiles per piece."""

    programs: int
    slots: int
    pieces: int
    piece_tiles: int


def cut(batch: int, longest: int, rows: int, row_block: int, tile: int, split_tokens: int, processors: int) -> Cut:
    """`longest` bounds the lengths, which only the device knows; `processors` can run one program each at a time."""
    if split_tokens:
        pieces = max(1, -(-longest // split_tokens))
        return Cut(batch * pieces, batch * pieces, pieces, split_tokens // tile)
    programs = max(1, processors // -(-rows // row_block))
    return Cut(programs, programs + batch, 0, 0)


def portable_config(rank: int) -> Config:
    """Tiles that fit any GPU since Ampere: 512 latent columns of 32 rows are 64 accumulators a thread."""
    return Config(32, 32, 8, 2) if rank > 256 else Config(64, 64, 8, 2)


def portable_candidates(rank: int) -> list[Config]:
    """What a sweep of the portable kernel tries."""
    return [Config(r, t, w, s) for r in (32, 64) for t in (32, 64) for w in (4, 8) for s in (1, 2, 3) if r * rank <= 2**15]


def run_decode(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, table: Tensor | None, lengths: Tensor | None, scale: float,
    split_tokens: int = 0, *, config: Config | None = None, processors: int | None = None,
) -> Tensor:  # fmt: skip
    """Context [B, T, H, R] of `mla_decode`; its arguments, and what tests and sweeps set.

    config: tiles of the portable kernel, which then runs. processors: programs at a time.
    """
    check(q_latent, q_rope, latent, rope, table, lengths)
    hopper = None if config else hopper_form(q_latent, latent, rope)
    config = config or portable_config(latent.shape[-1])
    tile, row_block = (hopper.TILE, hopper.ROWS) if hopper else (config.tile, config.rows)
    page = latent.shape[1]
    for what, size in (("page size", page if table is not None else 0), ("split_tokens", split_tokens)):
        if size % tile:
            raise ValueError(f"{what} must be a multiple of the kernel's {tile} keys, got {size}")
    batch, new, heads, rank = q_latent.shape
    longest = page if table is None else table.shape[1] * page
    processors = processors or _processors(q_latent.device)
    parts = cut(batch, longest, new * heads, row_block, tile, split_tokens, processors)
    out = torch.empty((batch, new, heads, rank), dtype=q_latent.dtype, device=q_latent.device)
    partial = torch.empty((parts.slots, new * heads, rank), dtype=torch.float32, device=out.device)
    log_sum = torch.empty((parts.slots, new * heads), dtype=torch.float32, device=out.device)
    q_latent, q_rope = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent, q_rope))
    tensors = (q_latent, q_rope, latent, rope, table, lengths, out, partial, log_sum)
    sequences = triton.next_power_of_2(batch)
    if hopper:
        hopper.launch(*tensors, scale * LOG2_E, parts, fixed=bool(split_tokens))
    else:
        _launch_portable(*tensors, scale * LOG2_E, parts, config, fixed=bool(split_tokens))
    expected = parts.pieces or parts.programs // batch + 1
    splits = min(128, max(8, triton.next_power_of_2(expected)))
    columns = min(4096 // splits, triton.next_power_of_2(rank))
    blocks = triton.cdiv(rank, columns)
    sharing = max(1, min(new * heads, 1024 // (batch * blocks)))
    if parts.pieces != 1:
        merge_kernel[(blocks, sharing, batch)](
            partial, log_sum, out, lengths, page, batch, parts.programs, parts.pieces, parts.piece_tiles, *out.stride()[:3],
            T=new, H=heads, R=rank, TILE=tile, SEQUENCES=sequences, FIXED=bool(split_tokens), SPLITS=splits, COLUMNS=columns,
            num_warps=4,
        )  # fmt: skip
    return out


def _launch_portable(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, table: Tensor | None, lengths: Tensor | None, out: Tensor,
    partial: Tensor, log_sum: Tensor, scale_log2: float, parts: Cut, config: Config, *, fixed: bool,
) -> None:  # fmt: skip
    batch, new, heads, rank = q_latent.shape
    turned = q_rope.shape[-1]
    decode_kernel[(triton.cdiv(new * heads, config.rows), parts.programs)](
        q_latent, q_rope, latent, rope, table, lengths, out, partial, log_sum, *q_latent.stride()[:3], *q_rope.stride()[:3],
        *latent.stride()[:2], *rope.stride()[:2], 0 if table is None else table.stride(0), *out.stride()[:3],
        latent.shape[1], batch, parts.pieces, parts.piece_tiles, scale_log2,
        T=new, H=heads, R=rank, ROPE=turned, PAGE=0 if table is None else latent.shape[1], ROWS=config.rows, TILE=config.tile,
        R_PAD=triton.next_power_of_2(rank), ROPE_PAD=max(16, triton.next_power_of_2(turned)),
        SEQUENCES=triton.next_power_of_2(batch), FIXED=fixed, STAGES=config.stages,
        PRECISION="ieee" if q_latent.dtype == torch.float32 else "tf32", num_warps=config.warps,
    )  # fmt: skip


def check(q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, table: Tensor | None, lengths: Tensor | None) -> None:
    """Refuse shapes that the kernels would read wrongly."""
    new = q_latent.shape[1]
    if not 1 <= new <= MAX_NEW_TOKENS:
        raise ValueError(f"absorbed decoding takes 1 to {MAX_NEW_TOKENS} new tokens, got {new}")
    if latent.stride(-1) != 1 or rope.stride(-1) != 1 or latent.shape[:2] != rope.shape[:2]:
        raise ValueError(f"latent and rotated rows must be contiguous and equally many, got {latent.shape} and {rope.shape}")
    for name, x in (("block table", table), ("lengths", lengths)):
        if x is not None and x.dtype != torch.int32:
            raise ValueError(f"the {name} must be int32, got {x.dtype}")
    if table is not None and lengths is None:
        raise ValueError("paged decoding needs the lengths of the sequences")


@cache
def _on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def hopper_form(q_latent: Tensor, latent: Tensor, rope: Tensor) -> Any:
    """The kernel for Hopper where it serves these tensors; None: the portable one runs."""
    if not (q_latent.is_cuda and _on_hopper()):
        return None
    form = import_module("openling.ops.kernels.mla_hopper")
    return form if form.serves(q_latent, latent, rope) else None


@cache
def _count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _processors(device: torch.device) -> int:
    """How many programs of this size run at once."""
    return _count(device) if device.type == "cuda" else 4


@torch.library.custom_op("openling::mla_decode", mutates_args=())
def mla_decode(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, table: Tensor | None, lengths: Tensor | None, scale: float,
    split_tokens: int,
) -> Tensor:  # fmt: skip
    """Context [B, T, H, R] of the T <= 4 newest tokens of each sequence over its first `lengths` rows, those T included.

    q_latent [B, T, H, R] is W_k^T q_nope, q_rope [B, T, H, r]. With a block table (int32 [B, pages]) latent is [P, S, R] and
    rope [P, S, r], S a multiple of 64; both may be views of joint rows. Without one they are [B, S, R] and [B, S, r], and
    without lengths (int32 [B]) all S rows count. A sequence of length 0 gets zeros. split_tokens: see above.
    """
    return run_decode(q_latent, q_rope, latent, rope, table, lengths, scale, split_tokens)


@mla_decode.register_fake
def _(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, table: Tensor | None, lengths: Tensor | None, scale: float,
    split_tokens: int,
) -> Tensor:  # fmt: skip
    return q_latent.new_empty(q_latent.shape)
