"""Where each tensor of the model lies: the model is built on meta devices, and `plan.table` says along which axis each is cut.

Order of cuts, as in `parallel.apply`: pipeline (whole layers), tensor and expert, then fully sharded along dim 0 by FSDP2, but
for vectors and routers, which are whole on every rank. Master weights are FP32. Layers' matrices are gathered in BF16, embeddings
and head in FP32: they are whole only while their block works. `tests/plan/test_placement.py` compares with `parallel.apply`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.plan.mesh import Mesh
from openling.plan.stages import stage_layers
from openling.plan.table import Placement, is_apart, placement

Kind = tuple[str, bool, bool]  # a layer's mixer, whether it has experts, whether it is an MTP layer


@dataclass(frozen=True)
class TensorInfo:
    """A parameter or buffer of the model; `layer` is None outside the layers."""

    name: str
    shape: tuple[int, ...]
    buffer: bool
    layer: int | None
    row: Placement

    @property
    def apart(self) -> bool:
        """Whether FSDP leaves it alone: buffers, vectors and routers."""
        return self.buffer or is_apart(self.name, len(self.shape))

    def whole(self, mesh: Mesh) -> tuple[int, ...]:
        """Its shape on one rank while its block works: cut by tensor or expert only."""
        shape = list(self.shape)
        if self.row.expert:
            shape[0] = -(-shape[0] // mesh.expert)
        if self.row.tensor is not None and not self.buffer:
            shape[self.row.tensor] = -(-shape[self.row.tensor] // mesh.tensor)
        return tuple(shape)

    def local(self, mesh: Mesh) -> tuple[int, ...]:
        """Its shape on the fullest rank."""
        first, *rest = self.whole(mesh)
        return (-(-first // self.shards(mesh)), *rest)

    def shards(self, mesh: Mesh) -> int:
        """Over how many ranks FSDP spreads it."""
        return 1 if self.apart else mesh.expert_fsdp if self.row.expert else mesh.fsdp

    def placement(self, mesh: Mesh) -> dict[str, Any]:
        """For people and `--json`: which axes cut which dim."""
        cuts: list[str] = []
        if self.row.expert and mesh.expert > 1:
            cuts.append(f"expert: dim 0 / {mesh.expert}")
        if self.row.tensor is not None and mesh.tensor > 1:
            cuts.append(f"tensor: dim {self.row.tensor} / {mesh.tensor}")
        if self.shards(mesh) > 1:
            cuts.append(f"shard: dim 0 / {self.shards(mesh)}")
        return {"shape": list(self.shape), "local_shape": list(self.local(mesh)), "cuts": cuts}


@dataclass(frozen=True)
class Block:
    """What is gathered and freed together: a layer, the embeddings, or the final norm with the LM head. Values, not bytes."""

    local: int
    """Of all parameters, on the fullest rank."""
    dense: int
    """What FSDP gathers, whole on this tensor rank; of experts those of one expert rank."""
    experts: int
    apart: int
    """What FSDP leaves alone: whole on every data rank, a part of `local`."""
    partial: int
    """What tensor ranks hold alike and whose gradients they add up, a part of `local`."""
    buffers: int
    tensors: int
    matrices: int
    """What Muon updates, on the fullest rank."""
    matrix_tensors: int
    shared_matrices: int
    """Of these what Muon gathers over FSDP's ranks, whole on this tensor rank: all but experts, whose matrices are not cut."""
    split_matrices: int
    """What it gathers over tensor ranks, whole there: what these split, for experts of this rank."""

    @property
    def gathered(self) -> int:
        """Values that are whole on one rank while the block works only."""
        return self.dense + self.experts

    @property
    def whole(self) -> int:
        """Values on one rank while the block works; gradients, before they are reduced, are as many."""
        return self.gathered + self.apart


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

    sharded, muon = [t for t in parameters if not t.apart], [t for t in parameters if is_muon(t)]
    return Block(
        local=values(t.local(mesh) for t in parameters),
        dense=values(t.whole(mesh) for t in sharded if not t.row.expert),
        experts=values(t.whole(mesh) for t in sharded if t.row.expert),
        apart=values(t.local(mesh) for t in parameters if t.apart),
        partial=values(t.local(mesh) for t in parameters if t.row.partial),
        buffers=values(t.shape for t in found if t.buffer),
        tensors=len(parameters),
        matrices=values(t.local(mesh) for t in muon),
        matrix_tensors=len(muon),
        shared_matrices=values(t.whole(mesh) for t in muon if not t.row.expert),
        split_matrices=mesh.tensor
        * values(t.local(mesh) if t.row.expert else t.whole(mesh) for t in muon if t.row.tensor is not None),
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
        tensors.append(TensorInfo(name, tuple(tensor.shape), buffer, int(found[1]) if found else None, placement(name)))
    return Inventory(c, tensors)
