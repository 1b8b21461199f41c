"""How many ranks share what: the axes of a mesh, what a model allows, and the process groups.

A world is pipeline x data_replicate x data_shard x context x tensor ranks. Dense parameters are sharded over data_shard x context
(both see other tokens of the batch) and copied over data_replicate. Expert ranks are taken from data_shard x context, the fast
index first: each holds a part of the experts and gets tokens from the others; what is left of the two axes shards that part.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from openling.errors import UserError
from openling.model.config import ModelConfig


@dataclass(frozen=True)
class Axes:
    """Ranks along each axis. `data_shard` = 0 takes what the others leave of the world."""

    pipeline: int = 1
    data_replicate: int = 1
    data_shard: int = 0
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.pipeline * self.data_replicate * self.data_shard * self.context * self.tensor

    @property
    def shards(self) -> int:
        """Ranks that share the dense parameters of one copy."""
        return self.data_shard * self.context

    @property
    def expert_shards(self) -> int:
        """Ranks that share the experts of one expert rank."""
        return self.shards // self.expert


def fit(axes: Axes, world: int) -> Axes:
    """The axes with `data_shard` filled in; a `UserError` where they do not make up the world."""
    for field in dataclasses.fields(axes):
        size, least = getattr(axes, field.name), 0 if field.name == "data_shard" else 1
        if size < least:
            raise UserError("a mesh axis has no ranks", where=field.name, value=size, expected=f"{least} or more")
    others = dataclasses.replace(axes, data_shard=1).world
    if axes.data_shard == 0 and world % others == 0:
        axes = dataclasses.replace(axes, data_shard=world // others)
    if axes.world != world:
        counts = {name.removeprefix("data_"): n for name, n in dataclasses.asdict(axes).items() if n > 1 and name != "expert"}
        sizes = " x ".join(f"{name} {n}" for name, n in counts.items()) or "1"
        if world % others == 0:
            where, near = "data_shard", world // others
            expected = f"{near}, which the other axes leave"
        else:
            where = _largest(axes)
            rest = others // getattr(axes, where)
            limit = world if world % rest else world // rest
            near = max(n for n in range(1, getattr(axes, where) + 1) if limit % n == 0)
            expected = f"divisors of {limit}"
        raise UserError(
            "the mesh is not as large as the world",
            where=where,
            value=f"{sizes} of {world} ranks",
            expected=expected,
            nearest=near,
        )
    return axes


def _largest(axes: Axes) -> str:
    """The axis to change first where the axes other than data_shard do not divide the world."""
    sizes = {name: n for name, n in dataclasses.asdict(axes).items() if name not in ("expert", "data_shard")}
    return max(sizes, key=lambda name: sizes[name])


def check(axes: Axes, config: ModelConfig) -> None:
    """A `UserError` that names the axis to change where the model cannot be cut so."""

    def refuse(axis: str, why: str, limit: int) -> None:
        """`limit`: what the axis must divide."""
        size = getattr(axes, axis)
        best = max(n for n in range(1, size + 1) if math.gcd(n, limit) == n) if limit else 1
        raise UserError(
            f"the model cannot be cut so: {why}", where=axis, value=size, expected=f"a divisor of {limit}", nearest=best
        )

    for why, limit in _tensor_limits(config):
        if limit % axes.tensor:
            refuse("tensor", why, limit)
    if axes.expert > 1:
        if not config.moe_layers:
            refuse("expert", "it has no experts", 1)
        if config.num_experts % axes.expert:
            refuse("expert", f"it has {config.num_experts} experts", config.num_experts)
        if axes.shards % axes.expert:
            refuse("expert", "expert ranks are taken from data_shard x context", axes.shards)
    layers = config.num_hidden_layers
    if axes.pipeline > layers:
        expected = f"at most num_hidden_layers = {layers}"
        raise UserError("a stage would have no layer", where="pipeline", value=axes.pipeline, expected=expected, nearest=layers)


def _tensor_limits(c: ModelConfig) -> list[tuple[str, int]]:
    """What tensor ranks must divide, and why."""
    kinds = {c.layer_kind(i) for i in range(c.num_hidden_layers + c.num_nextn_predict_layers)}
    limits = [("attention is split by heads (num_attention_heads)", c.num_attention_heads)]
    if "gqa" in kinds:
        limits.append(("GQA layers split key/value heads too (num_key_value_heads)", c.num_key_value_heads))
    if "lightning" in kinds:
        limits.append(("groups of the Lightning output norm stay whole (group_norm_size)", c.group_norm_size))
    if len(c.moe_layers) < c.num_hidden_layers:
        limits.append(("dense feed-forward layers are split by columns (intermediate_size)", c.intermediate_size))
    if c.moe_layers:
        limits.append(("experts are split by columns (moe_intermediate_size)", c.moe_intermediate_size))
        if c.num_shared_experts:
            shared = c.moe_shared_expert_intermediate_size
            limits.append(("shared experts are split by columns (moe_shared_expert_intermediate_size)", shared))
    limits.append(("embeddings and head are split by words (vocab_size)", c.vocab_size))
    return limits


@dataclass(frozen=True)
class Mesh:
    """The axes of this world and the meshes and groups that the parts need. Made by `build`, on every rank."""

    axes: Axes
    device_type: str
    tokens: DeviceMesh
    """pipeline, data_replicate, data_shard, context, tensor."""
    dense: DeviceMesh
    """pipeline, data_replicate, shard, tensor."""
    experts: DeviceMesh
    """pipeline, data_replicate, shard, expert, tensor."""
    data: DeviceMesh
    """pipeline, data, tensor: all ranks with other tokens in one axis."""

    def rank(self, axis: str) -> int:
        """This rank's place along an axis of `tokens` ("data_shard", "context", ...), or along "expert" or "data"."""
        mesh = {"expert": self.experts, "data": self.data}.get(axis, self.tokens)
        return mesh.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along that axis alone."""
        mesh = {"expert": self.experts, "data": self.data}.get(axis, self.tokens)
        return mesh.get_group(axis)

    @property
    def data_rank(self) -> int:
        """Which rows of a batch this rank trains on: the same for ranks that share rows (context, tensor, pipeline)."""
        return self.rank("data_replicate") * self.axes.data_shard + self.rank("data_shard")

    @property
    def data_ranks(self) -> int:
        """How many parts a batch's rows are dealt to."""
        return self.axes.data_replicate * self.axes.data_shard


def build(axes: Axes, config: ModelConfig, device_type: str) -> Mesh:
    """The mesh of this world for such a model; torch.distributed must be up. Every rank calls it."""
    a = fit(axes, dist.get_world_size())
    check(a, config)

    def mesh(**sizes: int) -> DeviceMesh:
        return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    outer = {"pipeline": a.pipeline, "data_replicate": a.data_replicate}
    return Mesh(
        axes=a,
        device_type=device_type,
        tokens=mesh(**outer, data_shard=a.data_shard, context=a.context, tensor=a.tensor),
        dense=mesh(**outer, shard=a.shards, tensor=a.tensor),
        experts=mesh(**outer, shard=a.expert_shards, expert=a.expert, tensor=a.tensor),
        data=mesh(pipeline=a.pipeline, data=a.data_replicate * a.shards, tensor=a.tensor),
    )
