"""Balance of experts without an auxiliary loss: the router's bias follows the load, once per optimiser step (arXiv 2408.15664).

    e_i = mean(load) - load_i        b_i <- b_i + u (sign(e_i) - mean_j sign(e_j))

The second term keeps the sum of b where it was (Ling 2.0, arXiv 2510.22115). The bias only chooses experts; it has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from openling.model.ling import SparseMoE


@torch.no_grad()
def shifted_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The bias after one update, [..., E]; loads are tokens per expert."""
    load = load_E.to(torch.float64)
    sign = (load.mean(-1, keepdim=True) - load).sign().to(bias_E.dtype)
    return bias_E + rate * (sign - sign.mean(-1, keepdim=True))


class Balance:
    """The expert layers of a model in training: their loads, and the update of their biases."""

    def __init__(self, model: nn.Module, rate: float, summed: Callable[[Tensor], Tensor]) -> None:
        """summed: adds counts up over all ranks that see other tokens."""
        self.layers = [m for m in model.modules() if isinstance(m, SparseMoE)]
        self.rate, self.summed = rate, summed

    def clear(self) -> None:
        """Forget the tokens counted so far."""
        for layer in self.layers:
            layer.tokens_E = None

    @torch.no_grad()
    def take(self) -> Tensor | None:
        """Tokens per expert of every layer that saw some since the last call, [layers, E], and count from 0 again."""
        seen = [layer for layer in self.layers if layer.tokens_E is not None]
        if not seen:
            return None
        loads = self.summed(torch.stack([layer.tokens_E for layer in seen if layer.tokens_E is not None]))
        self._seen = seen
        self.clear()
        return loads

    @torch.no_grad()
    def update(self, loads: Tensor) -> None:
        """Shift the biases by what `take` returned."""
        if not self.rate:
            return
        for layer, load in zip(self._seen, loads, strict=True):
            bias = layer.gate.expert_bias
            if bias is not None:
                bias.copy_(shifted_bias(bias, load, self.rate))


def imbalance(loads: Tensor) -> float:
    """The fullest expert's tokens over the mean of its layer, averaged over layers: 1 is even."""
    load = loads.to(torch.float64)
    return float((load.amax(-1) / load.mean(-1).clamp(min=1e-9)).mean())
