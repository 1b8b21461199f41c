"""Sampling as tensor arithmetic: penalties, filters, masks and exact draws, for a batch whose rows differ in every setting.

Every filter is a threshold on the logits, so that equal logits share their fate and no sort order is visible. Sums over the
vocabulary that decide something are sums of integers (probabilities in units of 2^-40 of the largest): exact, and so the
same in any order, on any device, in any batch. Nothing here waits for a GPU.

Legend: B rows (one sampled token each), V vocabulary, N candidates of a row (likeliest first), W words of 32 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Resolution of probabilities in exact sums, relative to the likeliest token's; what is smaller is never drawn. Sums of a million
# of them stay below 2^63.
UNIT_BITS = 40
# Candidates that a CPU looks at before it sorts the whole vocabulary for top_p.
FEW = 1024


def filter_logits(
    logits_BV: Tensor, *, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor, candidates: int | None = None
) -> Tensor:
    """Logits over the temperature (above 0), -inf where top_k, top_p or min_p rule a token out; the likeliest always stays.

    Off: top_k 0, top_p 1, min_p 0. Order: temperature, top_k, top_p (of what top_k left), min_p, as in transformers.
    candidates: how many of the likeliest tokens top_k and top_p need to see: 0 if both are off in every row, the largest top_k
    (or more) if no row has top_p without top_k, else None. The result does not depend on it.
    """
    x_BV = logits_BV / temperature_B[:, None]
    most_B1 = x_BV.amax(-1, keepdim=True)
    floor_B1 = most_B1 + min_p_B.to(x_BV).log()[:, None]  # log 0 = -inf: off
    if candidates != 0:
        floor_B1 = torch.maximum(floor_B1, _candidate_floor(x_BV, most_B1, top_k_B, top_p_B, candidates)[:, None])
    return x_BV.masked_fill(x_BV < floor_B1, float("-inf"))


def _candidate_floor(x_BV: Tensor, most_B1: Tensor, top_k_B: Tensor, top_p_B: Tensor, candidates: int | None) -> Tensor:
    """The smallest logit that top_k and top_p let through, [B]; -inf where both are off."""
    vocab_size = x_BV.shape[-1]
    if candidates is not None and candidates < vocab_size:
        return _floor_among(x_BV.topk(candidates).values, most_B1, top_k_B, top_p_B, whole_B=None)[0]
    whole_B = units_of(x_BV, most_B1).sum(-1)
    if not x_BV.is_cuda and vocab_size > FEW:  # asking whether that was enough would wait for a GPU
        floor_B, enough_B = _floor_among(x_BV.topk(FEW).values, most_B1, top_k_B, top_p_B, whole_B)
        if bool(enough_B.all()):
            return floor_B
    return _floor_among(x_BV.sort(-1, descending=True).values, most_B1, top_k_B, top_p_B, whole_B)[0]


def _floor_among(
    best_BN: Tensor, most_B1: Tensor, top_k_B: Tensor, top_p_B: Tensor, whole_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_candidate_floor` from the likeliest N, and whether these were enough. whole_B: units of whole rows, for top_p alone."""
    n = best_BN.shape[-1]
    in_k_BN = (torch.arange(n, device=best_BN.device) < top_k_B[:, None]) | (top_k_B == 0)[:, None]
    units_BN = units_of(best_BN, most_B1) * in_k_BN
    reached_BN = units_BN.cumsum(-1)
    seen_B = (top_k_B > 0) & (top_k_B <= n)
    whole_B = reached_BN[:, -1] if whole_B is None else torch.where(seen_B, reached_BN[:, -1], whole_B)
    # Candidates before which less than top_p has been collected: the smallest set that reaches it.
    wanted_B = (top_p_B.double() * whole_B).ceil().long()
    kept_B = ((reached_BN - units_BN < wanted_B[:, None]) & in_k_BN).sum(-1).clamp(min=1)
    off_B = (top_k_B == 0) & (top_p_B >= 1)
    floor_B = best_BN.gather(-1, kept_B[:, None] - 1)[:, 0].masked_fill(off_B, float("-inf"))
    return floor_B, off_B | seen_B | ((top_k_B == 0) & (reached_BN[:, -1] >= wanted_B))


def units_of(logits_BV: Tensor, most_B1: Tensor | None = None) -> Tensor:
    """Probabilities that are proportional to exp(logits), as whole numbers: 2^40 for `most_B1`, the largest logit."""
    if most_B1 is None:
        most_B1 = logits_BV.amax(-1, keepdim=True)
    return to_units((logits_BV - most_B1).exp_())


def to_units(probability_BV: Tensor) -> Tensor:
    """Numbers from 0 to 1 as whole numbers of 2^-40, int64."""
    return (probability_BV * float(1 << UNIT_BITS)).round_().long()


def draw(units_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the sum of `units_BV` (int64, not all 0 in a row) passes uniform_B (FP64, in [0, 1)) of the whole, [B].

    A token of 0 units is never drawn. A row without any (from NaN logits) yields some valid id.
    """
    sum_BV = units_BV.cumsum(-1)
    total_B = sum_BV[:, -1]
    target_B = torch.minimum((uniform_B * total_B).long(), total_B - 1)
    found_B = torch.searchsorted(sum_BV, target_B[:, None], right=True)[:, 0]
    return found_B.clamp(max=units_BV.shape[-1] - 1)


def draw_in_blocks(units_BV: Tensor, uniform_B: Tensor, *, block: int = 256) -> Tensor:
    """The tokens of `draw`, for many rows: sums of blocks first, then within the one block that counts; nothing as long as V."""
    vocab, short = units_BV.shape[-1], -units_BV.shape[-1] % block
    blocks_BNK = (F.pad(units_BV, (0, short)) if short else units_BV).unflatten(-1, (-1, block))
    sum_BN = blocks_BNK.sum(-1).cumsum(-1)
    total_B = sum_BN[:, -1]
    target_B1 = torch.minimum((uniform_B * total_B).long(), total_B - 1)[:, None]
    at_B1 = torch.searchsorted(sum_BN, target_B1, right=True).clamp(max=sum_BN.shape[-1] - 1)
    before_B1 = sum_BN.gather(-1, (at_B1 - 1).clamp(min=0)).masked_fill(at_B1 == 0, 0)
    inside_BK = blocks_BNK.gather(1, at_B1[:, :, None].expand(-1, -1, block))[:, 0].cumsum(-1)
    found_B1 = at_B1 * block + torch.searchsorted(inside_BK, target_B1 - before_B1, right=True)
    return found_B1[:, 0].clamp(max=vocab - 1)


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: Tensor | float) -> Tensor:
    """CTRL's penalty (arXiv 1909.05858) on tokens that were seen: logits above 0 over it, others times it."""
    lowered_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, lowered_BV, logits_BV)


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers from the host as a tensor on `device`. Copies from pageable memory do not wait for the GPU if told not to block."""
    return torch.as_tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


def unpack_bits(words_BW: Tensor, vocab_size: int) -> Tensor:
    """Boolean [B, V] of int32 words whose lowest bit is the first token; tokens beyond the words are False."""
    bits = torch.arange(32, device=words_BW.device, dtype=torch.int32)
    allowed = ((words_BW[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]
    return torch.nn.functional.pad(allowed, (0, vocab_size - allowed.shape[1]))
