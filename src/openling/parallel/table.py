"""Where every parameter of `model.ling` lies: the placement table, and the part of a tensor that one rank holds.

The rest follows from a row. Tensor ranks split one dim of a parameter; of `query_key_value` they split Q, K and V each, which are
stacked in that dim. Expert ranks split dim 0 of the stacked experts. What remains is sharded over dim 0 by FSDP. A parameter that
tensor ranks do not split is copied; where each rank uses its copy for its own heads alone, the gradients are summed (`partial`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openling.model.config import ModelConfig


@dataclass(frozen=True)
class Placement:
    """One row: which dim tensor ranks split, whether expert ranks split dim 0, whether copies have partial gradients."""

    tensor: int | None = None
    expert: bool = False
    partial: bool = False


WHOLE = Placement()
PARTIAL = Placement(partial=True)
ROWS, COLUMNS = Placement(tensor=0), Placement(tensor=1)

# A name's first match counts. Behind `layers.N.` hidden and MTP layers are alike.
TABLE: tuple[tuple[str, Placement], ...] = (
    (r"word_embeddings\.weight|lm_head\.weight", ROWS),
    (r"attention\.query_key_value\.(weight|bias)", ROWS),
    (r"attention\.(q_proj|q_b_proj|kv_b_proj|g_proj)\.(weight|bias)|attention\.g_norm\.weight", ROWS),
    (r"attention\.dense\.weight|(mlp|shared_experts)\.down_proj\.weight", COLUMNS),
    (r"attention\.dense\.bias|(mlp|shared_experts)\.down_proj\.bias", WHOLE),
    (r"attention\..*", PARTIAL),  # QK-norms, MLA's down-projections and the norms of latents: every rank reads its own heads
    (r"mlp\.experts\.(gate_proj|up_proj)", Placement(tensor=1, expert=True)),
    (r"mlp\.experts\.down_proj", Placement(tensor=2, expert=True)),
    (r"mlp\.gate\.(weight|expert_bias)", WHOLE),
    (r"(mlp|shared_experts)\.(gate_proj|up_proj)\.(weight|bias)", ROWS),
    (r"eh_proj\.weight|.*norm\.weight", WHOLE),
)
_COMPILED = tuple((re.compile(pattern), row) for pattern, row in TABLE)


def placement(name: str) -> Placement:
    """The row of a parameter, by its name in the model."""
    inner = re.sub(r"^(model\.)?(layers\.\d+\.)?", "", name)
    inner = inner.removeprefix("mlp.") if inner.startswith("mlp.shared_experts") else inner
    for pattern, row in _COMPILED:
        if pattern.fullmatch(inner):
            return row
    raise KeyError(f"the placement table has no row for {name}: add one to parallel/table.py")


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
