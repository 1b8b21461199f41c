"""The part of every parameter that tensor and expert ranks leave to one rank, by the placement table (`plan.table`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openling.model.config import ModelConfig
from openling.plan.table import placement


@dataclass(frozen=True)
class Run:
    """Consecutive indices of one dim: they stand at `local` in a rank's tensor and at `start` in the whole one."""

    local: int
    start: int
    length: int


def split(sections: list[int], ranks: int, rank: int) -> list[Run]:
    """What one of `ranks` holds of a dim of stacked sections, each split evenly."""
    runs, local, start = [], 0, 0
    for section in sections:
        length = section // ranks
        runs.append(Run(local, start + rank * length, length))
        local, start = local + length, start + section
    return runs


def within(runs: list[Run], first: int, last: int) -> list[Run]:
    """The same for local indices first to last, counted from `first`."""
    cut = [(max(r.local, first), min(r.local + r.length, last), r) for r in runs]
    return [Run(a - first, r.start + a - r.local, b - a) for a, b, r in cut if a < b]


def sections(name: str, config: ModelConfig, rows: int) -> list[int]:
    """The stacked sections of a parameter's split dim of that size: Q, K, V of `query_key_value`, else one."""
    if ".query_key_value." not in name:
        return [rows]
    queries = config.num_attention_heads * config.head_dim
    return [queries, (rows - queries) // 2, (rows - queries) // 2]


@dataclass(frozen=True)
class Held:
    """The part of a whole tensor that tensor and expert ranks leave to this one: its runs along every dim."""

    size: torch.Size
    runs: tuple[tuple[Run, ...], ...]
    copies: int = 1
    """How many tensor ranks hold the same."""
    partial: bool = False
    """Whether their gradients are parts of a sum."""
    expert: bool = False

    def take(self, whole: Tensor) -> Tensor:
        """This part of the whole tensor, as a tensor of its own."""
        for dim, runs in enumerate(self.runs):
            if len(runs) > 1 or runs[0].length != whole.shape[dim]:
                whole = torch.cat([whole.narrow(dim, r.start, r.length) for r in runs], dim)
        return whole.contiguous()


def held(name: str, size: torch.Size, config: ModelConfig, tensor: tuple[int, int], expert: tuple[int, int]) -> Held:
    """What the rank at (rank, of ranks) along tensor and expert holds of a parameter."""
    row = placement(name)
    runs = [[Run(0, 0, n)] for n in size]
    if row.tensor is not None and tensor[1] > 1:
        runs[row.tensor] = split(sections(name, config, size[row.tensor]), tensor[1], tensor[0])
    if row.expert:
        runs[0] = split([size[0]], expert[1], expert[0])
    copies = tensor[1] if row.tensor is None else 1
    return Held(size, tuple(map(tuple, runs)), copies, row.partial and tensor[1] > 1, row.expert)


def holdings(model: nn.Module, config: ModelConfig, tensor: tuple[int, int], expert: tuple[int, int]) -> dict[str, Held]:
    """`held` of every parameter of a whole model."""
    return {name: held(name, p.shape, config, tensor, expert) for name, p in model.named_parameters()}


def take_parts(model: nn.Module, parts: dict[str, Held]) -> None:
    """Replace every parameter by this rank's part of it; parameters that are one stay one."""
    known: dict[nn.Parameter, nn.Parameter] = {}
    for module_name, module in list(model.named_modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            full = f"{module_name}.{name}" if module_name else name
            if full in parts:  # of a shared parameter only the first name is listed
                data = parts[full].take(p.detach())
                known[p] = p if data.shape == p.shape else nn.Parameter(data.clone(), requires_grad=p.requires_grad)
            setattr(module, name, known[p])
