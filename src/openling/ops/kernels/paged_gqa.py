"""Decoding of grouped-query attention over pages on NVIDIA GPUs; twin: `openling.ops.attention.paged_attention`.

A program reads SPLIT keys of one key/value head once, for all queries of its group and all T new tokens, and leaves a
normalised partial output with the log2 of its softmax denominator; `_merge_kernel` adds the partials up in order. Sequences are
cut after fixed numbers of tokens, so a sequence's result is the same bit for bit in any batch. Lengths stay on the device:
programs behind a sequence's end return at once, and one CUDA graph serves all lengths.

Legend: B sequences, T new tokens, H heads, K key/value heads, G = H / K, D head dim, P pages, S rows of a page, N splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
# Keys of a program, and how many such programs per sequence and head there may be: 16 tiles repay reading the queries.
SPLIT_TOKENS = 1024
MOST_SPLITS = 128


@triton.jit
def _split_kernel(
    q, keys, values, table, lengths, partial, log_sum, q_b, q_t, q_h, k_p, k_s, k_h, v_p, v_s, v_h, table_b, scale_log2,
    T: tl.constexpr, G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Grid: (splits, key/value heads, sequences). Row t * G + g of a program is query head g of the group, token t."""
    split, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + b)
    row, column, inside = tl.arange(0, ROWS), tl.arange(0, D_PAD), tl.arange(0, PAGE)
    real, wide = row < T * G, column < D
    place = ((b * K + head) * N + split) * (T * G) + row
    first = split * SPLIT
    if first >= length:
        tl.store(log_sum + place, float("-inf") + tl.zeros((ROWS,), tl.float32), mask=real)
        return
    t, h = row // G, head * G + row % G
    at = q + b * q_b + t[:, None] * q_t + h[:, None] * q_h + column[None, :]
    query = tl.load(at, mask=real[:, None] & wide[None, :], other=0.0)
    seen = length - T + 1 + t
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D_PAD), tl.float32)
    for start in range(first, tl.minimum(first + SPLIT, length), PAGE):
        page = tl.load(table + b * table_b + start // PAGE).to(tl.int64)
        key = start + inside
        live = (key < length)[:, None] & wide[None, :]
        k = tl.load(keys + page * k_p + inside[:, None] * k_s + head * k_h + column[None, :], mask=live, other=0.0)
        v = tl.load(values + page * v_p + inside[:, None] * v_s + head * v_h + column[None, :], mask=live, other=0.0)
        score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale_log2
        score = tl.where(key[None, :] < seen[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        fading = tl.exp2(top - higher)
        total = total * fading + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * fading[:, None], input_precision=PRECISION)
        top = higher
    # A row that sees none of these keys has no weight among the splits.
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(partial + place[:, None] * D + column[None, :], acc, mask=real[:, None] & wide[None, :])
    tl.store(log_sum + place, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=real)


@triton.jit
def _merge_kernel(
    partial, log_sum, lengths, out, out_b, out_t, out_h,
    T: tl.constexpr, G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Grid: (T * G rows, key/value heads, sequences)."""
    row, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, D_PAD)
    wide = column < D
    splits = tl.cdiv(tl.load(lengths + b), SPLIT)
    top = -1e30
    total = 0.0
    acc = tl.zeros((D_PAD,), tl.float32)
    for split in range(splits):
        place = ((b * K + head) * N + split) * (T * G) + row
        log2_sum = tl.load(log_sum + place)
        higher = tl.maximum(top, log2_sum)
        weight, fading = tl.exp2(log2_sum - higher), tl.exp2(top - higher)
        acc = acc * fading + tl.load(partial + place * D + column, mask=wide, other=0.0) * weight
        total = total * fading + weight
        top = higher
    acc = acc / tl.where(total > 0, total, 1.0)
    at = out + b * out_b + (row // G) * out_t + (head * G + row % G) * out_h + column
    tl.store(at, acc.to(out.dtype.element_ty), mask=wide)


def paged_attention(
    q_BTHD: Tensor, k_pages_PSKD: Tensor, v_pages_PSKD: Tensor, table_BP: Tensor, lengths_B: Tensor, scale: float
) -> Tensor:
    """As the twin, [B, T, H, D]."""
    batch, new, heads, dim = q_BTHD.shape
    page, kv_heads = k_pages_PSKD.shape[1:3]
    if q_BTHD.stride(-1) != 1 or k_pages_PSKD.stride(-1) != 1 or v_pages_PSKD.stride(-1) != 1:
        raise ValueError("the last dim of queries, keys and values must be contiguous")
    group = heads // kv_heads
    longest = table_BP.shape[1] * page
    # The cut follows the room in the table: the engine gives every step of a deterministic run the same.
    split = max(SPLIT_TOKENS, page * triton.next_power_of_2(-(-longest // (MOST_SPLITS * page))))
    splits = max(1, -(-longest // split))
    out = torch.empty_like(q_BTHD, memory_format=torch.contiguous_format)
    partial = torch.empty((batch, kv_heads, splits, new * group, dim), dtype=torch.float32, device=out.device)
    log_sum = torch.empty(partial.shape[:-1], dtype=torch.float32, device=out.device)
    shape = {"T": new, "G": group, "K": kv_heads, "D": dim, "D_PAD": triton.next_power_of_2(dim), "SPLIT": split, "N": splits}
    _split_kernel[(splits, kv_heads, batch)](
        q_BTHD, k_pages_PSKD, v_pages_PSKD, table_BP, lengths_B, partial, log_sum, *q_BTHD.stride()[:3],
        *k_pages_PSKD.stride()[:3], *v_pages_PSKD.stride()[:3], table_BP.stride(0), scale * LOG2_E,
        **shape, ROWS=max(16, triton.next_power_of_2(new * group)), PAGE=page,
        PRECISION="ieee" if q_BTHD.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3,
    )  # fmt: skip
    _merge_kernel[(new * group, kv_heads, batch)](
        partial, log_sum, lengths_B, out, *out.stride()[:3], **shape, num_warps=1 if dim <= 128 else 2
    )
    return out
