"""What the loop asks of a mesh, in one place: here for one process, where everything is local.

Data, expert, context and tensor parallel training give the loop another object with these methods and change nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Ranks(Protocol):
    """A mesh as the loop sees it."""

    @property
    def main(self) -> bool:
        """Whether this rank writes metrics and speaks."""
        ...

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all ranks that see other tokens: counts, shares of losses, tokens per expert."""
        ...

    def run(self, compute: Callable[[], T]) -> T:
        """Call `compute`, which uses the model in any way."""
        ...

    def last_of_step(self, last: bool) -> None:
        """Said before each backward: whether it is the step's last."""
        ...

    def clip(self, parameters: list[nn.Parameter], limit: float) -> float:
        """Complete the gradients, scale them to a norm of at most `limit`; their norm before that."""
        ...

    def agreed(self, flag: bool) -> bool:
        """Whether any rank says so: signals and the clock must stop all ranks at the same step."""
        ...


class Alone:
    """One process."""

    main = True

    def summed(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def run(self, compute: Callable[[], T]) -> T:
        """Now."""
        return compute()

    def last_of_step(self, last: bool) -> None:
        """Gradients need no sending."""

    def clip(self, parameters: list[nn.Parameter], limit: float) -> float:
        """By torch."""
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def agreed(self, flag: bool) -> bool:
        """One rank agrees with itself."""
        return flag
