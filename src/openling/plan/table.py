"""Where every parameter of `model.ling` lies: the placement table, which the plan and training (`parallel`) read. No torch.

The rest follows from a row. Tensor ranks split one dim of a parameter; of `query_key_value` they split Q, K and V each, which are
stacked in that dim. Expert ranks split dim 0 of the stacked experts. What remains is sharded over dim 0 by FSDP, but for vectors
and routers (`is_apart`). A parameter that tensor ranks do not split is copied; where each rank uses its copy for its own heads
alone, the gradients are summed (`partial`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


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
    raise KeyError(f"the placement table has no row for {name}: add one to plan/table.py")


def is_apart(name: str, dims: int) -> bool:
    """Whether FSDP leaves a parameter alone: vectors and routers are whole, in FP32, on every data and context rank."""
    return dims == 1 or name.endswith("mlp.gate.weight")
