"""What the loop asks of a mesh: sums over ranks, agreement, one rank that speaks. For one process everything is local.

Small things (counts, signals, errors) travel as CPU tensors, for which no GPU is waited: torch.distributed must be up with a
backend for them as well, "cpu:gloo,cuda:nccl" on GPUs. Methods that say "every rank" are collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from openling.parallel.apply import Parallel

T = TypeVar("T")


def told(compute: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What `compute` returns or raises on the group's first rank, the only one that calls it. None: one process."""
    if group is None:
        return compute()
    answer: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            answer[0] = compute()
        except Exception as error:  # raised by every rank below
            answer[1] = error
    dist.broadcast_object_list(answer, device=torch.device("cpu"), group=group, group_src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


class Ranks:
    """The ranks that train one model together. Every rank makes it, from what `parallel.apply` returned."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel, self.mesh = parallel, parallel.mesh
        self.number = 0 if self.mesh is None else dist.get_rank()
        self.main = self.number == 0
        """Whether this rank writes metrics and speaks."""
        self.saving = None if self.mesh is None else dist.new_group(backend="gloo")
        """All ranks, for the thread that writes checkpoints: it must not share a group with the loop."""

    @property
    def count(self) -> int:
        """Ranks in all."""
        return 1 if self.mesh is None else self.mesh.axes.world

    @property
    def data_ranks(self) -> int:
        """How many ranks a batch's rows are dealt to."""
        return 1 if self.mesh is None else self.mesh.data_ranks

    @property
    def sharers(self) -> int:
        """How many ranks work on the same rows: those along pipeline, context and tensor."""
        return 1 if self.mesh is None else self.mesh.axes.pipeline * self.mesh.axes.context * self.mesh.axes.tensor

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all ranks that see other tokens: counts, shares of losses, tokens per expert. Every rank."""
        return self.parallel.summed(x)

    def merged(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Counts by name, each data rank's once. Every rank."""
        if self.mesh is None:
            return dict(counts)
        lead = all(self.mesh.rank(axis) == 0 for axis in ("pipeline", "context", "tensor"))
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, dict(counts) if lead else {})
        return {name: sum(one.get(name, 0) for one in found) for name in sorted({n for one in found for n in one})}

    def mean_over_stages(self, mean: float | None, count: int) -> float | None:
        """The mean over all of a pipeline's layers, from that of the `count` here. Every rank."""
        if self.parallel.pipeline is None:
            return mean
        found = torch.tensor([(mean or 0.0) * count, count], dtype=torch.float64)
        dist.all_reduce(found, group=self.parallel.pipeline.group)
        return float(found[0] / found[1]) if found[1] else None

    def agreed(self, flag: bool) -> bool:
        """Whether any rank says so: the clock must stop all ranks at the same step. Every rank."""
        return bool(self.highest(int(flag)))

    def highest(self, number: int) -> int:
        """The highest of all ranks' numbers. Every rank."""
        if self.mesh is None:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def told(self, compute: Callable[[], T]) -> T:
        """What `compute` returns or raises on the main rank, the only one that calls it. Every rank."""
        return told(compute, None if self.mesh is None else dist.group.WORLD)
