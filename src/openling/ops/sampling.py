"""Sampling as tensor arithmetic: penalties, filters, masks and exact draws, for a batch whose rows differ in every setting.

Every filter is a threshold on the logits, so that equal logits share their fate and no sort order is visible. Sums over the
vocabulary that decide something are sums of integers (probabilities in units of 2^-40): exact, and so the same in any order, on
any device, in any batch. Nothing here waits for a GPU.

Legend: B rows (one sampled token each), V vocabulary, N candidates of a row (likeliest first), W words of 32 bits, U = 2^40.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Resolution of probabilities in exact sums. The sum of V of them stays far below 2^63; what is smaller is never drawn.
UNIT_BITS = 40


def filter_logits(
    logits_BV: Tensor, *, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor, candidates: int | None = None
) -> Tensor:
    """Logits over the temperature (above 0), -inf where top_k, top_p or min_p rule a token out; the likeliest always stays.

    Off: top_k 0, top_p 1, min_p 0. Order: temperature, top_k, top_p (of what top_k left), min_p, as in transformers.
    candidates: how many of the likeliest tokens top_k and top_p need to see, the same answer for any number that is enough:
    None all of them, 0 if both are off in every row, else at least the largest top_k if no row has top_p without top_k.
    """
    x_BV = logits_BV / temperature_B[:, None]
    floor_B1 = x_BV.amax(-1, keepdim=True) + min_p_B.to(x_BV).log()[:, None]  # log 0 = -inf: off
    if candidates != 0:
        n = x_BV.shape[-1] if candidates is None else min(candidates, x_BV.shape[-1])
        best_BN = x_BV.sort(-1, descending=True).values if n == x_BV.shape[-1] else x_BV.topk(n).values
        floor_B1 = torch.maximum(floor_B1, _candidate_floor(best_BN, top_k_B, top_p_B)[:, None])
    return x_BV.masked_fill(x_BV < floor_B1, float("-inf"))


def _candidate_floor(best_BN: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """The smallest logit that top_k and top_p let through, [B]; -inf where both are off."""
    n = best_BN.shape[-1]
    off = float("-inf")
    k_B = torch.where(top_k_B > 0, top_k_B, n).clamp(max=n)
    in_k_BN = torch.arange(n, device=best_BN.device) < k_B[:, None]
    units_BN = to_units(best_BN.masked_fill(~in_k_BN, off).softmax(-1))
    reached_BN = units_BN.cumsum(-1)
    # Candidates before which less than top_p has been collected: the smallest set that reaches it.
    wanted_B1 = (top_p_B.double() * reached_BN[:, -1]).ceil().long()[:, None]
    in_p_BN = (reached_BN - units_BN < wanted_B1) & in_k_BN
    in_p_BN[:, 0] = True
    kept_B = in_p_BN.sum(-1)
    floor_B = best_BN.gather(-1, kept_B[:, None] - 1)[:, 0]
    return floor_B.masked_fill((top_k_B == 0) & (top_p_B >= 1), off)


def to_units(probability_BV: Tensor) -> Tensor:
    """Probabilities as whole numbers of 2^-40, int64."""
    return (probability_BV * float(1 << UNIT_BITS)).round().long()


def draw(units_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the sum of `units_BV` (int64, not all 0 in a row) passes uniform_B (FP64, in [0, 1)) of the whole, [B].

    A token of 0 units is never drawn. A row without any (from NaN logits) yields some valid id.
    """
    sum_BV = units_BV.cumsum(-1)
    total_B = sum_BV[:, -1]
    target_B = torch.minimum((uniform_B * total_B).long(), total_B - 1)
    found_B = torch.searchsorted(sum_BV, target_B[:, None], right=True)[:, 0]
    return found_B.clamp(max=units_BV.shape[-1] - 1)


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
