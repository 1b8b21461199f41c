"""Removing QK-norm from a layer that becomes MLA: key up-projections cannot be absorbed through a per-token norm.

Three replacements of `gamma * k / rms(k)` by a linear map of the layer input (migration recipe of the Ling-2.6 report,
p. 7, eq. 1-2, and two of ours). The norm stands before RoPE, so folding gamma into rows is exact; the rest is not.
Legend: h heads, D head dim, M1 hidden size + 1 (the last column is the bias, the last input is 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from openling.migrate.calibrate import Gram

QkNormRemoval = Literal["pooled", "scalar", "ridge"]
REMOVALS: tuple[QkNormRemoval, ...] = ("pooled", "scalar", "ridge")


def normed_heads(weight_hDM: Tensor, gamma_D: Tensor, eps: float, x_NM: Tensor) -> tuple[Tensor, Tensor]:
    """The exact normalised heads [N, h, D] and each head's rms [N, h]."""
    raw = torch.einsum("hdm,nm->nhd", weight_hDM, x_NM)
    rms = (raw.pow(2).mean(-1) + eps).sqrt()
    return gamma_D * raw / rms[..., None], rms


def remove_norm(
    weight_hDM: Tensor, gamma_D: Tensor, eps: float, inputs: Sequence[Tensor], method: QkNormRemoval, *, damping: float = 1e-4
) -> Tensor:
    """Weights [h, D, M1] whose plain product replaces the normalised heads; `inputs` are batches [N, M1], all FP64.

    pooled: the dataset rms of each head for that of each token, 1 / sqrt(E[r^2]). scalar: the best single factor per
    head, E[r e] / E[r^2 e], e = |k_hat|^2 (E[r] / E[r^2] where gamma is one). ridge: the best linear map,
    E[k_hat x^T] (E[x x^T] + lambda)^-1, drawn towards scalar's, so that on `inputs` it is never worse.
    """
    gram, moments = Gram(), weight_hDM.new_zeros(3, len(weight_hDM))
    for x in inputs:
        exact, rms = normed_heads(weight_hDM, gamma_D, eps, x)
        energy = exact.pow(2).sum(-1)
        moments += torch.stack((rms.pow(2).mean(0), (rms * energy).mean(0), (rms.pow(2) * energy).mean(0))) * len(x)
        if method == "ridge":
            gram.add(x, exact.flatten(1))
    square, cross, weighted = moments / sum(len(x) for x in inputs)
    factor = square.rsqrt() if method == "pooled" else cross / weighted
    scaled = factor[:, None, None] * gamma_D[:, None] * weight_hDM
    return gram.ridge(damping, scaled.flatten(0, 1)).view_as(scaled) if method == "ridge" else scaled


@torch.no_grad()
def removal_error(weight_hDM: Tensor, gamma_D: Tensor, eps: float, inputs: Sequence[Tensor], replacement_hDM: Tensor) -> float:
    """Relative squared error of a replacement on `inputs`."""
    wrong = energy = 0.0
    for x in inputs:
        exact = normed_heads(weight_hDM, gamma_D, eps, x)[0]
        wrong += float((torch.einsum("hdm,nm->nhd", replacement_hDM, x) - exact).pow(2).sum())
        energy += float(exact.pow(2).sum())
    return wrong / energy


def best_removal(weight_hDM: Tensor, gamma_D: Tensor, eps: float, inputs: Sequence[Tensor]) -> QkNormRemoval:
    """The method with the least error on the last batch when fitted on the others (on all, if there is but one)."""
    fit, held_out = (inputs[:-1], inputs[-1:]) if len(inputs) > 1 else (inputs, inputs)
    errors = {
        m: removal_error(weight_hDM, gamma_D, eps, held_out, remove_norm(weight_hDM, gamma_D, eps, fit, m)) for m in REMOVALS
    }
    return min(errors, key=lambda m: errors[m])
