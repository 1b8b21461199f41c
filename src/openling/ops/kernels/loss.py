"""Cross-entropy, KL to a teacher and their gradient from one chunk of logits, in place; twin: `ops.loss._Call.chunk`.

    ce = lse(x) - x[target]      kl = sum_v t_v (y_v - x_v) + lse(x) - lse(y)      x student's, y teacher's logits, t = softmax(y)
    d / dx = ce_weight (p - onehot) + kl_weight (p - t)                            p = softmax(x)

A program owns a row and walks it twice: sums, then the gradient over the logits themselves. Logits come as the matrix product
left them (BF16: rounded to 8 bits, as any half-precision head does); everything after is FP32, and the gradient is rounded once
on its way back. The second walk runs backwards, from the end that the L2 cache still holds. Each thread keeps its own running
maximum and sum, so a walk has no barrier; the threads' shares meet once per row. Bytes per logit in BF16: 2 + 4 without a
teacher, 4 + 6 with one, less what the cache serves of the second reading.
Legend: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-1.0e38)


class Walk(NamedTuple):
    """A step of a walk along a row: `lines` reads of `columns` neighbouring logits, 8 columns per thread; and the warps."""

    lines: int
    columns: int
    warps: int


def walk_config(vocabulary: int, *, teacher: bool) -> Walk:
    """One program fills a processor, so that the rows at work together (132 x 2 V bytes) stay close to what the L2 holds.

    32 warps at 64 registers, or 16 at 128 where a teacher's sums are kept too. Rows that are no multiple of 32 B are read value
    by value, which takes registers as well.
    """
    columns = min(4096 if teacher else 8192, max(256, triton.next_power_of_2(vocabulary)))
    lines = min(2 if teacher or vocabulary % 16 else 4, triton.next_power_of_2(triton.cdiv(vocabulary, columns)))
    return Walk(lines, columns, columns // 256)


def walk_candidates() -> list[Walk]:
    """Steps worth measuring for wide rows."""
    return [Walk(lines, 256 * warps, warps) for lines in (1, 2, 4) for warps in (8, 16, 32)]


@triton.jit
def _row(pointer, at, VOCABULARY):
    return tl.load(pointer + at, mask=at < VOCABULARY, other=float("-inf")).to(tl.float32)


@triton.jit
def _merge(top, total):
    """One maximum, and the sum relative to it, of every thread's own."""
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp2(top - highest), 0)


@triton.jit
def _head_losses(
    logits, teacher, targets, out, vocabulary, logits_row, teacher_row, ce_weight, kl_weight,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, TEACHER: tl.constexpr, AGREEMENT: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """ce, kl and whether both have the same likeliest token, for one row; with GRADIENT the gradient in place of the logits.

    Exponents are kept in units of ln 2 (`top`, `lse`): exp2 is the machine's own exponential.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, y_row = logits + row * logits_row, teacher + row * teacher_row
    target = tl.load(targets + row)
    chosen = tl.load(x_row + target).to(tl.float32)  # before any gradient is written over it
    step: tl.constexpr = LINES * COLUMNS
    place = tl.arange(0, LINES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    steps = tl.cdiv(vocabulary, step)

    top, total = tl.full((COLUMNS,), LOWEST, tl.float32), tl.zeros((COLUMNS,), tl.float32)
    y_top, y_total, apart = top, total, total
    for i in range(steps):
        at = i * step + place
        x = _row(x_row, at, vocabulary)
        new_top = tl.maximum(top, tl.max(x, 0) * LOG2_E)
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x * LOG2_E - new_top[None, :]), 0)
        top = new_top
        if TEACHER:
            y = _row(y_row, at, vocabulary)
            new_top = tl.maximum(y_top, tl.max(y, 0) * LOG2_E)
            fade = tl.exp2(y_top - new_top)
            t = tl.exp2(y * LOG2_E - new_top[None, :])
            y_total = y_total * fade + tl.sum(t, 0)
            apart = apart * fade + tl.sum(t * tl.where(at < vocabulary, y - x, 0.0), 0)
            y_top = new_top
    highest, norm = _merge(top, total)
    lse = highest + tl.log2(norm)
    tl.store(out + row * 3, lse * LN_2 - chosen)
    y_lse, y_highest = lse, highest
    if TEACHER:
        y_highest, y_norm = _merge(y_top, y_total)
        _, distance = _merge(y_top, apart)
        y_lse = y_highest + tl.log2(y_norm)
        tl.store(out + row * 3 + 1, distance / y_norm + (lse - y_lse) * LN_2)

    if GRADIENT or AGREEMENT:
        first, y_first = tl.full((COLUMNS,), 2147483647, tl.int32), tl.full((COLUMNS,), 2147483647, tl.int32)
        for i in range(steps):
            at = (steps - 1 - i) * step + place
            x = _row(x_row, at, vocabulary)
            p = tl.exp2(x * LOG2_E - lse)
            grad = ce_weight * tl.where(at == target, p - 1.0, p)
            if TEACHER:
                y = _row(y_row, at, vocabulary)
                grad += kl_weight * (p - tl.exp2(y * LOG2_E - y_lse))
                if AGREEMENT:
                    first = tl.minimum(first, tl.min(tl.where(x * LOG2_E == highest, at, 2147483647), 0))
                    y_first = tl.minimum(y_first, tl.min(tl.where(y * LOG2_E == y_highest, at, 2147483647), 0))
            if GRADIENT:
                # Not needed again here: the L2 keeps what the other rows still have to read a second time.
                done = grad.to(logits.dtype.element_ty)
                tl.store(x_row + at, done, mask=at < vocabulary, eviction_policy="evict_first")
        if AGREEMENT:
            tl.store(out + row * 3 + 2, (tl.min(first, 0) == tl.min(y_first, 0)).to(tl.float32))


@torch.library.custom_op("openling::head_losses", mutates_args=("logits_CV",))
def head_losses(
    logits_CV: Tensor, teacher_CV: Tensor | None, targets_C: Tensor, ce_weight: float, kl_weight: float,
    agreement: bool, gradient: bool,
) -> Tensor:  # fmt: skip
    """Per token ce, kl and agreement, FP32 [C, 3], zeros where not asked; with `gradient` logits become their gradient.

    Agreement counts the lowest index among equal maxima. kl, agreement and kl_weight need a teacher.
    """
    assert logits_CV.stride(1) == 1 and (teacher_CV is None or teacher_CV.stride(1) == 1), "logits must have contiguous rows"
    teacher = logits_CV if teacher_CV is None else teacher_CV
    out = torch.zeros(logits_CV.shape[0], 3, dtype=torch.float32, device=logits_CV.device)
    config = walk_config(logits_CV.shape[1], teacher=teacher_CV is not None)
    _head_losses[(logits_CV.shape[0],)](
        logits_CV, teacher, targets_C, out, logits_CV.shape[1], logits_CV.stride(0), teacher.stride(0), ce_weight, kl_weight,
        config.lines, config.columns, teacher_CV is not None, agreement and teacher_CV is not None, gradient,
        num_warps=config.warps,
    )  # fmt: skip
    return out


@head_losses.register_fake
def _(
    logits_CV: Tensor, teacher_CV: Tensor | None, targets_C: Tensor, ce_weight: float, kl_weight: float,
    agreement: bool, gradient: bool,
) -> Tensor:  # fmt: skip
    return logits_CV.new_empty(logits_CV.shape[0], 3, dtype=torch.float32)
