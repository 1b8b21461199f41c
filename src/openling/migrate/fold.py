"""How many neighbouring RoPE frequencies are taken as one (FreqFold of TransMLA, arXiv 2502.07864).

Folding lets the shared rotated key draw on the heads' pairs of several frequencies, so that it keeps more of their energy, but
turns parts of it at a neighbour's frequency. Where the trade pays depends on the layer: TransMLA doubles one fold for all until
perplexity stops falling, here each layer's is doubled until the error of its attention outputs rises.

Legend: B windows, T tokens, H query heads, K key/value heads, D head dim, r rotated dims of MLA, M1 hidden size + 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from openling.errors import UserError
from openling.migrate.calibrate import relative
from openling.migrate.mla import Projections, concentrate, moment_of, split_rope
from openling.model.ling import RopeTables
from openling.ops.attention import softmax_attention
from openling.ops.rope import apply_rope

# Windows whose attention is measured; eight chose as two did in the layers of SmolLM2 that were tried.
FOLD_WINDOWS = 2


def folds(rotary: int, rope: int) -> list[int]:
    """The folds that `rope` of `rotary` dims allow: the least, rotary / rope, and its doubles that divide the frequencies."""
    least = rotary // rope
    found = [least]
    while rotary // 2 % (2 * found[-1]) == 0:
        found.append(2 * found[-1])
    return found


def check_fold(fold: int | Literal["auto"], rotary: int, rope: int) -> None:
    """A UserError for a fold that is none of `folds`; 1 stands for the least."""
    known = folds(rotary, rope)
    if fold not in ("auto", 1, *known):
        expected = f"auto, 1, or one of {', '.join(map(str, known))} for {rope} of {rotary} rotated dims"
        raise UserError("frequencies cannot be folded so", where="--conversion.rope_fold", value=fold, expected=expected)


@torch.no_grad()
def best_fold(
    w: Projections,
    inputs: Sequence[Tensor],
    tables: RopeTables,
    *,
    rotary: int,
    rope: int,
    query_weighted: bool,
    attention: Sequence[Tensor] | None = None,
) -> tuple[int, dict[int, float]]:
    """The fold with the least error of the heads' attention outputs, and the errors: fitted on the first batch, measured on
    windows of the last.

    inputs: batches of layer inputs [B * T, M1] in FP64. tables: of windows of T tokens, `latent` of MLA's rotated dims.
    attention: what each token receives, by batch; see `concentrate`.
    """
    first, held_out = inputs[:1], inputs[-1][: FOLD_WINDOWS * tables.head[0].shape[1]]
    moment = moment_of(first)
    attended = moment_of(first, attention[:1]) if attention else moment
    exact = attention_outputs(w, held_out, tables, rotary)
    errors: dict[int, float] = {}
    for fold in folds(rotary, rope):
        keep = fold * rope // rotary
        basis = concentrate(w, moment, rotary, fold, keep=keep, query_weighted=query_weighted, attended=attended)
        found = partly_rotated_outputs(w, held_out, tables, *split_rope(w, basis, rotary, fold))
        errors[fold] = relative((found - exact).square().sum(), exact.square().sum())
        if errors[fold] > min(errors.values()):
            break
    return min(errors, key=lambda fold: errors[fold]), errors


@torch.no_grad()
def attention_received(w: Projections, x: Tensor, tables: RopeTables) -> Tensor:
    """The attention that each token receives from all queries of its window, mean over heads, FP64 [B * T]; 1 on average.

    Scores of one head of one window exist at a time, in FP32 whatever autocast is on.
    """
    q, k = (apply_rope(_heads(rows, x, tables), *tables.head) for rows in (w.q, w.k))
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=x.device).triu(1)
    received = x.new_zeros(q.shape[:2])
    with torch.autocast(x.device.type, enabled=False):
        for window, head in itertools.product(range(q.shape[0]), range(q.shape[2])):
            scores = q[window, :, head] @ k[window, :, head // w.group].T * q.shape[-1] ** -0.5
            received[window] += scores.masked_fill(future, -torch.inf).softmax(-1).sum(0)
    return received.flatten() / q.shape[2]


def attention_outputs(w: Projections, x: Tensor, tables: RopeTables, rotary: int) -> Tensor:
    """What the heads read with their own rotated keys, [B, T, H, D]; x [B * T, M1]."""
    q, k, v = (_heads(rows, x, tables) for rows in (w.q, w.k, w.v))
    return _attend(apply_rope(q, *tables.head), apply_rope(k, *tables.head), v, q.shape[-1])


def partly_rotated_outputs(w: Projections, x: Tensor, tables: RopeTables, k_rope: Tensor, q_rope: Tensor, left: Tensor) -> Tensor:
    """What they read with `split_rope`'s shared rotated key and the rest of the keys unrotated, [B, T, H, D]."""
    q, k, v = (_heads(rows, x, tables) for rows in (w.q, left, w.v))
    turned = [apply_rope(_heads(rows, x, tables), *tables.latent, interleaved=True) for rows in (q_rope, k_rope[None])]
    shared = turned[1].expand(-1, -1, k.shape[2], -1)
    return _attend(torch.cat((q, turned[0]), -1), torch.cat((k, shared), -1), v, q.shape[-1])


def _heads(rows_hDM: Tensor, x_NM: Tensor, tables: RopeTables) -> Tensor:
    """FP32 [B, T, h, D] of rows of batches."""
    tokens = tables.head[0].shape[1]
    return torch.einsum("hdm,nm->nhd", rows_hDM, x_NM).unflatten(0, (-1, tokens)).float()


def _attend(q: Tensor, k: Tensor, v: Tensor, dim: int) -> Tensor:
    """Causal attention at the source's scale, whatever the width of q and k."""
    with torch.autocast(q.device.type, enabled=False):  # two forms are compared: the same rounding for both
        return softmax_attention(q, k, v, scale=dim**-0.5)
