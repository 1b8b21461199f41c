"""What the conversions find out on their way through the layers, as plain records for journals and reports."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

# Points of a curve that is drawn: more cannot be told apart.
CURVE_POINTS = 64


@dataclass(frozen=True)
class Approximation:
    """One inexact step: `value` is a relative squared error, or a share of energy kept, as `measure` says."""

    step: str
    layer: int
    measure: str
    value: float


@dataclass(frozen=True)
class Spectrum:
    """How much energy a factor of an MLA layer would keep at each of `ranks`; `rank` is the chosen one, and among them.

    part: kv (in the metric in which K and V share the latent) or query.
    """

    layer: int
    part: str
    rank: int
    ranks: list[int]
    energy: list[float]

    @staticmethod
    def of(layer: int, part: str, squared: Tensor, rank: int) -> Spectrum:
        """From all squared singular values, descending; thinned to about `CURVE_POINTS` ranks, evenly on a log scale."""
        count = len(squared)
        evenly = torch.logspace(0, math.log10(count), CURVE_POINTS, dtype=torch.float64).round().long().tolist()
        ranks = sorted({*evenly, min(rank, count), count})
        energy = squared.double().clamp(min=0)
        share = (energy.cumsum(0) / energy.sum()).nan_to_num(nan=1.0).cpu()  # of a factor that is zero, all is kept
        return Spectrum(layer, part, rank, ranks, [float(share[r - 1]) for r in ranks])


@dataclass(frozen=True)
class HeadSpans:
    """Of each head of a Lightning layer, in tokens: its half-life, and how far back the teacher's head in its place looks."""

    layer: int
    half_life: list[float]
    look_back: list[float]

    @staticmethod
    def of(layer: int, log_decay_H: Tensor, look_back_H: Tensor) -> HeadSpans:
        """Half-life: the distance at which a decay of exp(g) per token leaves one half."""
        return HeadSpans(layer, (math.log(2) / -log_decay_H.double()).tolist(), look_back_H.tolist())


@dataclass
class Findings:
    """All of a layer, or of a whole conversion."""

    approximations: list[Approximation] = field(default_factory=list)
    spectra: list[Spectrum] = field(default_factory=list)
    heads: list[HeadSpans] = field(default_factory=list)

    def add(self, more: Findings) -> None:
        """Append another layer's."""
        self.approximations += more.approximations
        self.spectra += more.spectra
        self.heads += more.heads

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)
