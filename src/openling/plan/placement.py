"""Where each tensor of the model lies: the model is built on meta devices, and a table says along which axis each name is cut.

Order of cuts: pipeline (whole layers), tensor and expert, then fully sharded along dim 0 by FSDP2. Master weights are FP32; a
block's BF16 weights exist in whole only while it works.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from openling.errors import Failure
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.plan.mesh import Mesh
from openling.plan.stages import stage_layers


@dataclass(frozen=True)
class Rule:
    """How tensors whose name ends like `pattern` are cut: the dim split over tensor ranks, or stacked experts."""

    pattern: str
    tensor_dim: int | None = None
    experts: bool = False


Kind = tuple[str, bool, bool]  # a layer's mixer, whether it has experts, whether it is an MTP layer

# The first rule that fits counts. Rows of query_key_value are split head by head, [Q | K | V] each for itself.
RULES = (
    Rule(r"mlp\.experts\.(gate|up)_proj$", tensor_dim=1, experts=True),
    Rule(r"mlp\.experts\.down_proj$", tensor_dim=2, experts=True),
    Rule(r"(word_embeddings|lm_head)\.weight$", tensor_dim=0),
    Rule(r"attention\.(query_key_value|g_proj|q_proj|q_b_proj|kv_b_proj)\.(weight|bias)$", tensor_dim=0),
    Rule(r"attention\.g_norm\.weight$", tensor_dim=0),
    Rule(r"attention\.dense\.weight$", tensor_dim=1),
    Rule(r"mlp\.(shared_experts\.)?(gate|up)_proj\.(weight|bias)$", tensor_dim=0),
    Rule(r"mlp\.(shared_experts\.)?down_proj\.weight$", tensor_dim=1),
    # Whole on every tensor rank: norms, the router, MLA's down-projections, MTP's joint, biases of split outputs.
    Rule(r"norm\.weight$|mlp\.gate\.(weight|expert_bias)$|attention\.(q_a_proj|kv_a_proj_with_mqa)\.(weight|bias)$"),
    Rule(r"eh_proj\.weight$|attention\.dense\.bias$|mlp\.(shared_experts\.)?down_proj\.bias$"),
)


@dataclass(frozen=True)
class TensorInfo:
    """A parameter or buffer of the model; `layer` is None outside the layers."""

    name: str
    shape: tuple[int, ...]
    buffer: bool
    layer: int | None
    rule: Rule

    def whole(self, mesh: Mesh) -> tuple[int, ...]:
        """Its shape on one rank while its block works: cut by tensor or expert only."""
        shape = list(self.shape)
        if self.rule.experts:
            shape[0] = -(-shape[0] // mesh.expert)
        if self.rule.tensor_dim is not None:
            shape[self.rule.tensor_dim] = -(-shape[self.rule.tensor_dim] // mesh.tensor)
        return tuple(shape)

    def local(self, mesh: Mesh) -> tuple[int, ...]:
        """Its shape on the fullest rank. Buffers are not sharded."""
        first, *rest = self.whole(mesh)
        ranks = 1 if self.buffer else mesh.expert_fsdp if self.rule.experts else mesh.fsdp
        return (-(-first // ranks), *rest)

    def placement(self, mesh: Mesh) -> dict[str, Any]:
        """For people and `--json`: which axes cut which dim."""
        cuts: list[str] = []
        if self.rule.experts and mesh.expert > 1:
            cuts.append(f"expert: dim 0 / {mesh.expert}")
        if self.rule.tensor_dim is not None and mesh.tensor > 1:
            cuts.append(f"tensor: dim {self.rule.tensor_dim} / {mesh.tensor}")
        sharded = mesh.expert_fsdp if self.rule.experts else mesh.fsdp
        if sharded > 1 and not self.buffer:
            cuts.append(f"shard: dim 0 / {sharded}")
        return {"shape": list(self.shape), "local_shape": list(self.local(mesh)), "cuts": cuts}


@dataclass(frozen=True)
class Block:
    """What is gathered and freed together: a layer, the embeddings, or the final norm with the LM head. Values, not bytes."""

    local: int
    whole_dense: int
    whole_experts: int
    local_dense: int
    local_experts: int
    buffers: int
    tensors: int
    matrices: int
    matrix_tensors: int

    @property
    def whole(self) -> int:
        """Values on one rank while the block works."""
        return self.whole_dense + self.whole_experts


@dataclass
class Inventory:
    """Every tensor of a model, and its blocks on any mesh. Layers of one kind share their numbers."""

    config: ModelConfig
    tensors: list[TensorInfo]
    kinds: list[Kind] = field(init=False)  # of every layer
    _blocks: dict[Any, Block] = field(default_factory=dict)
    _stages: dict[tuple[int, int], list[list[int]]] = field(default_factory=dict)
    known_stages: dict[Any, Any] = field(default_factory=dict)  # what `setup.stages` made of them

    @property
    def layers(self) -> int:
        """Hidden and MTP layers."""
        return self.config.num_hidden_layers + self.config.num_nextn_predict_layers

    def __post_init__(self) -> None:
        c = self.config
        self.kinds = [(c.layer_kind(i), c.is_moe(i), i >= c.num_hidden_layers) for i in range(self.layers)]

    def layer_block(self, layer: int, mesh: Mesh) -> Block:
        """A layer as a block."""
        key = (self.kinds[layer], mesh.tensor, mesh.expert, mesh.fsdp, mesh.expert_fsdp)
        if key not in self._blocks:
            self._blocks[key] = block((t for t in self.tensors if t.layer == layer), mesh)
        return self._blocks[key]

    def outer_block(self, names: tuple[str, ...], mesh: Mesh) -> Block:
        """Embeddings, final norm or LM head as a block."""
        key = (names, mesh.tensor, mesh.fsdp)
        if key not in self._blocks:
            self._blocks[key] = block((t for t in self.tensors if t.name in names), mesh)
        return self._blocks[key]

    def stages(self, count: int, seq_len: int) -> list[list[int]]:
        """`stage_layers` of the model."""
        if (count, seq_len) not in self._stages:
            self._stages[count, seq_len] = stage_layers(self.config, count, seq_len)
        return self._stages[count, seq_len]


def block(tensors: Iterable[TensorInfo], mesh: Mesh) -> Block:
    """Sums over tensors."""
    found = list(tensors)
    parameters = [t for t in found if not t.buffer]

    def values(shapes: Iterable[tuple[int, ...]]) -> int:
        return sum(map(math.prod, shapes))

    dense, experts = ([t for t in parameters if t.rule.experts is e] for e in (False, True))
    return Block(
        local=values(t.local(mesh) for t in parameters),
        whole_dense=values(t.whole(mesh) for t in dense),
        whole_experts=values(t.whole(mesh) for t in experts),
        local_dense=values(t.local(mesh) for t in dense),
        local_experts=values(t.local(mesh) for t in experts),
        buffers=values(t.shape for t in found if t.buffer),
        tensors=len(parameters),
        matrices=values(t.local(mesh) for t in parameters if is_muon(t)),
        matrix_tensors=sum(is_muon(t) for t in parameters),
    )


def is_muon(tensor: TensorInfo) -> bool:
    """Whether Muon would update it: matrices of layers but the router; AdamW keeps embeddings, head, norms, router, biases."""
    return tensor.layer is not None and len(tensor.shape) > 1 and ".gate.weight" not in tensor.name and not tensor.buffer


def inventory(c: ModelConfig) -> Inventory:
    """Builds the model on meta devices and lists what it holds, in the checkpoint's names."""
    with torch.device("meta"):
        model = Ling(c)
    tensors = []
    named = [(n, t, False) for n, t in model.named_parameters()] + [(n, t, True) for n, t in model.named_buffers()]
    for name, tensor, buffer in named:
        found = re.match(r"model\.layers\.(\d+)\.", name)
        rule = next((r for r in RULES if re.search(r.pattern, name)), None)
        if rule is None:
            raise Failure("the table of cuts has no row for a tensor", where="plan/placement.py", value=name, expected="a rule")
        tensors.append(TensorInfo(name, tuple(tensor.shape), buffer, int(found[1]) if found else None, rule))
    return Inventory(c, tensors)
