"""One benchmark case: an operation at one shape, its peer, the least a machine must do for it, and the goal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Rates:
    """What the machine itself reaches, measured in the same run: device copy (read + write) in bytes/s, BF16 matmul in FLOP/s."""

    copy: float
    matmul: float


@dataclass(frozen=True)
class Floor:
    """What any implementation has to do: bytes moved to and from device memory, floating point operations."""

    bytes: int
    flops: int = 0

    def us(self, rates: Rates) -> float:
        """The shortest time in µs at the machine's own rates."""
        return 1e6 * max(self.bytes / rates.copy, self.flops / rates.matmul)


@dataclass(frozen=True)
class Goal:
    """At least `ratio` times the peer's speed, at least `fraction` of the floor's rate, at most `us` µs: all of those given."""

    ratio: float | None = None
    fraction: float | None = None
    us: float | None = None

    def met(self, *, us: float, peer_us: float | None, floor_us: float) -> bool | None:
        """Whether the measured times meet it; None where that hangs on a peer that was not measured."""
        missed = (self.us is not None and us > self.us) or (self.fraction is not None and floor_us / us < self.fraction)
        if missed or self.ratio is None:
            return not missed
        return None if peer_us is None else peer_us / us >= self.ratio

    def __str__(self) -> str:
        parts = [
            (self.ratio, lambda x: f"≥ {x:g}x peer"),
            (self.fraction, lambda x: f"≥ {100 * x:g} % floor"),
            (self.us, lambda x: f"≤ {x:,g} µs"),
        ]
        return ", ".join(say(value) for value, say in parts if value is not None)


@dataclass(frozen=True)
class Case:
    """One row of the table. `ours` and `peer` do the same work on tensors that exist already.

    In mode "graph" many calls are captured in one CUDA graph, so both must be capturable, and a small working set must cycle
    through enough buffers not to live in the L2 cache. Eager calls start with an L2 cache that was flushed.
    """

    op: str
    shape: str
    ours: Callable[[], object]
    peer: Callable[[], object] | None
    peer_name: str | None
    floor: Floor
    goal: Goal | None = None
    mode: Literal["eager", "graph"] = "eager"
    note: str | None = None

    def freed(self) -> Case:
        """The same case without its calls, and so without their tensors: what a table keeps."""
        return replace(self, ours=_freed, peer=None)


def _freed() -> None:
    raise RuntimeError("the tensors of this case are gone")
