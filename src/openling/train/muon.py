"""Muon over matrices and stacks of matrices: experts [E, F, M] are E matrices that are orthogonalised together.

    B <- mu B + (1 - mu) g     U = mu B + (1 - mu) g     X_0 = U / ||U||_F     X <- a X + (b A + c A^2) X,  A = X X^T,  5 times
    p <- p (1 - lr wd) - lr 0.2 sqrt(max(rows, columns)) X_5

Numbers and order are those of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, which takes single matrices only: a test
holds the two equal. The factor gives updates the size of AdamW's, so one learning rate serves both. The Gram matrix is always
that of the shorter side. Ling names Muon as future work; Ling-2.6 was trained with AdamW.

On a mesh a matrix's update is gathered in the dtype in which it is orthogonalised, every rank does the same work and takes its
part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from openling.parallel.matrices import Matrix

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# Matrices of one size are orthogonalised together up to so many bytes: one by one, small ones cost a GPU 15 launches each. A CPU
# has no launches to save, and multiplies stacks more slowly.
STACK_BYTES = {"cuda": 1 << 26, "cpu": 0}
EPS = 1e-7


def orthogonalised(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrices [..., m, n] with all singular values moved near 1 (0.7 to 1.2), in `dtype`."""
    a, b, c = COEFFICIENTS
    lead = x.shape[:-2]
    y = x.to(dtype).flatten(0, -3) if lead else x.to(dtype)[None]
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = torch.bmm(y, y.mT)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.mT if tall else y
    return y.reshape(x.shape)


class Muon(torch.optim.Optimizer):
    """For parameters of two or more dims; state: one `momentum_buffer` each."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
        matrices: dict[nn.Parameter, Matrix] | None = None,
    ) -> None:
        """matrices: how to gather those that ranks hold in parts; all of these ranks step together."""
        self.matrices = matrices or {}
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for alike in self._stacks([p for p in group["params"] if p.grad is not None], group["dtype"]):
                found = [self._direction(p, group) for p in alike]
                updates = orthogonalised(torch.stack(found) if len(found) > 1 else found[0][None], group["dtype"])
                size = 0.2 * math.sqrt(max(updates.shape[-2:]))
                for p, update in zip(alike, updates, strict=True):
                    matrix = self.matrices.get(p)
                    mine = update if matrix is None else matrix.mine(update)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(mine.to(p.dtype), alpha=-group["lr"] * size)

    def _stacks(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> Iterator[list[nn.Parameter]]:
        """Parameters of one size, so many at a time as `STACK_BYTES` holds; alike on all ranks, which gather in this order."""
        alike: dict[torch.Size, list[nn.Parameter]] = {}
        for p in parameters:
            alike.setdefault(self.matrices[p].size if p in self.matrices else p.shape, []).append(p)
        for size, found in alike.items():
            count = max(1, STACK_BYTES.get(found[0].device.type, 0) // (size.numel() * dtype.itemsize))
            yield from (found[i : i + count] for i in range(0, len(found), count))

    def _direction(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Nesterov's momentum of one parameter's gradient, whole."""
        assert p.grad is not None
        state, matrix = self.state[p], self.matrices.get(p)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(buffer, group["momentum"]).to(group["dtype"])
        return update if matrix is None else matrix.whole(update)
