"""Removing QK-norm from a layer that becomes MLA: key up-projections cannot be absorbed through a per-token norm.

Three replacements of `gamma * k / rms(k)` by a linear map of the layer input (migration recipe of the Ling-2.6 report,
p. 7, eq. 1-2, and two of ours). The norm stands before RoPE, so folding gamma into rows is exact; the rest is not.
Legend: h heads, D head dim, M1 hidden size + 1 (the last column is the bias, the last input is 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openling.migrate.calibrate import Gram, relative

QkNormRemoval = Literal["pooled", "scalar", "ridge"]
REMOVALS: tuple[QkNormRemoval, ...] = ("pooled", "scalar", "ridge")


class NormedHeads:
    """Heads `gamma * k / sqrt(mean k^2 + eps)`, k = weight x, and sums over inputs from which all replacements follow.

    weight [h, D, M1]; gamma [D], or [h, D] where heads differ in it (queries and keys, whose norms go in one pass). FP64.
    """

    def __init__(self, weight_hDM: Tensor, gamma: Tensor, eps: float) -> None:
        self.weight, self.eps = weight_hDM, eps
        self.gamma_hD = gamma.expand(weight_hDM.shape[:2])
        self.gram = Gram()
        self._moments_3h, self._energy_h = weight_hDM.new_zeros(3, len(weight_hDM)), weight_hDM.new_zeros(len(weight_hDM))

    def of(self, x_NM: Tensor) -> tuple[Tensor, Tensor]:
        """The exact normalised heads [N, h, D] and each head's rms [N, h]."""
        raw = (x_NM @ self.weight.flatten(0, 1).T).unflatten(1, self.weight.shape[:2])
        rms = (raw.pow(2).mean(-1) + self.eps).sqrt()
        return self.gamma_hD * raw / rms[..., None], rms

    def add(self, x_NM: Tensor) -> None:
        """Take in a batch of inputs."""
        exact, rms = self.of(x_NM)
        energy = exact.pow(2).sum(-1)
        self._moments_3h += torch.stack((rms.pow(2).sum(0), (rms * energy).sum(0), (rms.pow(2) * energy).sum(0)))
        self._energy_h += energy.sum(0)
        self.gram.add(x_NM, exact.flatten(1))

    def replacement(self, method: QkNormRemoval, *, damping: float = 1e-4) -> Tensor:
        """Weights [h, D, M1] whose plain product replaces the normalised heads.

        pooled: the dataset rms of each head for that of each token, 1 / sqrt(E[r^2]). scalar: the best single factor per
        head, E[r e] / E[r^2 e], e = |k_hat|^2 (E[r] / E[r^2] where gamma is one). ridge: the best linear map,
        E[k_hat x^T] (E[x x^T] + lambda)^-1, drawn towards scalar's, so that on the inputs taken in it is never worse.
        """
        square, cross, weighted = self._moments_3h / self.gram.count
        factor = square.rsqrt() if method == "pooled" else cross / weighted.clamp(min=1e-300)  # of a dead head
        scaled = factor[:, None, None] * self.gamma_hD[..., None] * self.weight
        return self.gram.ridge(damping, scaled.flatten(0, 1)).view_as(scaled) if method == "ridge" else scaled

    def errors(self, replacement_hDM: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error and energy of each head on the inputs taken in, [h] each: from their sums, so to 1e-15 of the energy."""
        zz, zy = self.gram.zz, self.gram.zy
        assert zz is not None and zy is not None
        rows = replacement_hDM.flatten(0, 1)
        inner = torch.addmm(zy.T, rows, zz, beta=-2).mul_(rows).sum(-1).view(self.weight.shape[:2]).sum(-1)
        return (inner + self._energy_h).clamp(min=0.0), self._energy_h

    def errors_on(self, x_NM: Tensor, replacement_hDM: Tensor) -> Tensor:
        """Squared error of each head on a batch, [h]."""
        made = (x_NM @ replacement_hDM.flatten(0, 1).T).unflatten(1, self.weight.shape[:2])
        return (made - self.of(x_NM)[0]).pow(2).sum((0, 2))


@dataclass(frozen=True)
class Removal:
    """How the norm of some heads was removed: the method, their new weights [h, D, M1], the relative squared error."""

    method: QkNormRemoval
    weight: Tensor
    error: float


def remove_norms(
    weight_hDM: Tensor,
    gamma_hD: Tensor,
    eps: float,
    inputs: Sequence[Tensor],
    method: QkNormRemoval | Literal["best"],
    sizes: Sequence[int],
) -> list[Removal]:
    """Remove the norms of heads that stand in groups of `sizes`, one method for each group; `inputs` are batches [N, M1].

    best: the method with the least error on the last batch when fitted on the others (on all, if there is but one).
    """
    heads, methods = NormedHeads(weight_hDM, gamma_hD, eps), REMOVALS if method == "best" else (method,)
    for x in inputs[:-1]:
        heads.add(x)
    last, chosen = inputs[-1], [methods[0]] * len(sizes)
    if len(inputs) == 1:
        heads.add(last)
    if method == "best":
        held_out = {m: heads.errors_on(last, heads.replacement(m)).split(list(sizes)) for m in methods}
        chosen = [min(methods, key=lambda m: float(held_out[m][group].sum())) for group in range(len(sizes))]
    if len(inputs) > 1:
        heads.add(last)
    found: dict[int, Removal] = {}
    for m in dict.fromkeys(chosen):
        made = heads.replacement(m)
        parts = zip(*(x.split(list(sizes)) for x in (made, *heads.errors(made))), strict=True)
        for group, (weight, wrong, energy) in enumerate(parts):
            if chosen[group] == m:  # a view would keep all of what was made
                found[group] = Removal(m, weight.clone(), relative(wrong.sum(), energy.sum()))
    return [found[group] for group in range(len(sizes))]
