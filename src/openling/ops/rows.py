"""Operations whose rows do not depend on how many rows there are, for batch-invariant mode (`pick.batch_invariant`).

A matrix library chooses its kernel, and with it the order of its sums, by the number of rows: products are made in blocks of
ROWS rows, the last one padded. Weights are read once per block.

On a CPU PyTorch computes exp and sigmoid of whole vectors by one formula, and of the numbers left at the end of a tensor or of a
thread's share of it by another, which rounds differently: they too are computed in blocks, which leave nothing over.

Legend: N rows, H heads, D and E widths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openling.ops.pick import batch_invariant

ROWS = 64
# Numbers that a CPU computes at a time: the vectors of any processor divide it, and PyTorch shares out only more than 2^15.
NUMBERS = 2**14
VECTORS = 256


def fixed_linear(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """`F.linear` for x [..., D], block by block; [..., E]."""
    rows_ND = x.reshape(-1, x.shape[-1])
    return torch.cat([F.linear(block, weight_ED, bias_E) for block in _row_blocks(rows_ND)])[: len(rows_ND)].unflatten(
        0, x.shape[:-1]
    )


def linear_rows(x: Tensor, weight_ED: Tensor) -> Tensor:
    """`F.linear`, in fixed blocks where a row must not depend on the others."""
    return fixed_linear(x, weight_ED) if batch_invariant() else F.linear(x, weight_ED)


def fixed_bmm(x_HND: Tensor, weight_HDE: Tensor) -> Tensor:
    """`torch.bmm`, block by block of rows; [H, N, E]."""
    blocks = [torch.bmm(block, weight_HDE) for block in _row_blocks(x_HND)]
    return torch.cat(blocks, dim=1)[:, : x_HND.shape[1]]


def silu_rows(x: Tensor) -> Tensor:
    """`F.silu`, computed `by_vectors`."""
    return by_vectors(F.silu, x)


def sigmoid_rows(x: Tensor) -> Tensor:
    """`torch.sigmoid`, computed `by_vectors`."""
    return by_vectors(torch.sigmoid, x)


def exp_rows(x: Tensor) -> Tensor:
    """`torch.exp`, computed `by_vectors`."""
    return by_vectors(torch.exp, x)


def by_vectors(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) of any shape for a function of single numbers; the same bits wherever a number stands in x."""
    if x.device.type != "cpu" or not batch_invariant():
        return function(x)
    padded = F.pad(x.flatten(), (0, -x.numel() % VECTORS))
    return torch.cat([function(part) for part in padded.split(NUMBERS)])[: x.numel()].view(x.shape)


def fix_linears(module: nn.Module) -> None:
    """Let every `nn.Linear` inside compute by `fixed_linear` from now on."""
    for m in module.modules():
        if type(m) is nn.Linear:
            m.__dict__["forward"] = _FixedLinear(m)


class _FixedLinear:
    """`nn.Linear.forward` in blocks."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return fixed_linear(x, self.linear.weight, self.linear.bias)


def _row_blocks(x: Tensor) -> list[Tensor]:
    """Blocks of ROWS rows along the last but one dim, the last one padded with zeros."""
    missing = -x.shape[-2] % ROWS
    return list(F.pad(x, (0, 0, 0, missing)).split(ROWS, dim=-2))
