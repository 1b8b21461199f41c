"""Latent ranks of the MLA layers under one total (`conversion.kv_rank_budget`): where energy lies deep, more dims are used.

The sum over layers of the relative squared error of K and V, each in its latent's own metric, is least when the budget goes to
the largest squared singular values over the layer's total, whichever layer they are of: every spectrum falls, so taking the
largest first is exact. CARE (FutureMLS-Lab/CARE, ICLR 2026) spends a fixed budget in the same greedy way, but divides gains by
the root of the rank and multiplies by the layers behind; that rule is not reproduced here.

The published config.json has one kv_lora_rank. A layer that uses fewer dims keeps the others at zero: shapes, engines and cache
are those of kv_lora_rank, the function is that of the smaller rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def share_ranks(spectra: Sequence[Tensor], mean_rank: int, widest: int) -> list[int]:
    """Ranks of at least 1 and at most `widest` whose mean is `mean_rank`, or less where the spectra end before.

    spectra: squared singular values of each layer, descending.
    """
    shares = [s[:widest].double().cpu().clamp(min=0) / s.double().cpu().clamp(min=0).sum().clamp(min=1e-300) for s in spectra]
    layer = torch.cat([torch.full((len(s) - 1,), i) for i, s in enumerate(shares)])
    gain = torch.cat([s[1:] for s in shares])
    chosen = layer[gain.argsort(descending=True, stable=True)[: len(spectra) * (mean_rank - 1)]]
    return (1 + torch.bincount(chosen, minlength=len(spectra))).tolist()
