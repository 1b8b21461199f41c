"""The mesh of a training job: its axes, how they are written, and which models they can carry. No torch here.

Ranks are numbered with the last axis fastest: pipeline, replicate, shard, context, tensor. Experts take their own axis out of
shard x context: `expert` neighbours hold different experts, the rest shard each expert's weights.

    world = pipeline x replicate x shard x context x tensor          expert divides shard x context
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from openling.errors import UserError, nearest
from openling.model.config import ModelConfig

Gather = Literal["layer", "accumulate", "step"]
Optimizer = Literal["adamw", "muon"]
GATHERS: tuple[Gather, ...] = get_args(Gather)
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
AXES = ("pipeline", "replicate", "shard", "context", "tensor", "expert")
ALIASES = {"data_replicate": "replicate", "data_shard": "shard"}


@dataclass(frozen=True)
class Mesh:
    """Degrees of every axis; 1 where an axis is not used."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.pipeline * self.replicate * self.shard * self.context * self.tensor

    @property
    def data(self) -> int:
        """Ranks that see different sequences."""
        return self.replicate * self.shard

    @property
    def all_data(self) -> int:
        """Ranks that see different tokens: what their gradients of whole weights are summed over."""
        return self.replicate * self.fsdp

    @property
    def fsdp(self) -> int:
        """Ranks that share each weight outside the experts: context ranks need the same weights, so they shard them too."""
        return self.shard * self.context

    @property
    def expert_fsdp(self) -> int:
        """Ranks that hold the same experts and shard their weights."""
        return self.fsdp // self.expert

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "one rank"

    def group(self, axis: str) -> tuple[int, int]:
        """Members of a group along an axis and the distance between neighbours' rank numbers; other names too."""
        inner = {
            "tensor": 1,
            "context": self.tensor,
            "shard": self.tensor * self.context,
            "fsdp": self.tensor,
            "all_data": self.tensor,
            "expert": self.tensor,
        }
        inner["expert_fsdp"] = self.tensor * self.expert
        inner["replicate"] = inner["shard"] * self.shard
        inner["pipeline"] = inner["replicate"] * self.replicate
        return getattr(self, axis), inner[axis]


def parse_mesh(text: str, world: int) -> Mesh:
    """`shard=256,expert=64,pipeline=8`: an axis that is not named is 1, but `shard` takes the ranks that remain."""
    degrees: dict[str, int] = {}
    for word in filter(None, text.replace(" ", "").split(",")):
        axis, equals, number = word.partition("=")
        axis = ALIASES.get(axis, axis)
        if axis not in AXES:
            raise UserError("unknown axis", where="--mesh", value=axis, expected=", ".join(AXES), nearest=nearest(axis, AXES))
        if not equals or not number.isdecimal() or int(number) < 1:
            raise UserError("an axis needs a number of ranks", where=f"--mesh {axis}", value=number or word, expected=f"{axis}=8")
        if axis in degrees:
            raise UserError("this axis is given twice", where=f"--mesh {axis}", value=number, expected="each axis once")
        degrees[axis] = int(number)
    others = math.prod(n for axis, n in degrees.items() if axis not in ("expert", "shard"))
    if "shard" not in degrees and world % others == 0:
        degrees["shard"] = world // others
    mesh = Mesh(**degrees)
    if mesh.world != world:
        left = world // others if world % others == 0 else None
        raise UserError(
            f"the axes multiply to {mesh.world:,} ranks, not to --world {world}",
            where="--mesh",
            value=str(mesh),
            expected="pipeline x replicate x shard x context x tensor = world (expert is taken from shard x context)",
            nearest=f"shard={left}" if left else None,
        )
    return mesh


@dataclass(frozen=True)
class Problem:
    """Why a mesh cannot be: the axis to change, what it must be, and the nearest value that is."""

    axis: str
    value: int
    expected: str
    nearest: int | None


def problems(c: ModelConfig, mesh: Mesh, *, seq_len: int) -> list[Problem]:
    """Everything in the model's shape that the mesh would cut where it cannot be cut."""
    found: list[Problem] = []

    def divides(axis: str, number: int, what: str) -> None:
        degree = getattr(mesh, axis)
        if number % degree:
            found.append(Problem(axis, degree, f"a divisor of {what} = {number:,}", _close(degree, divisors(number, number))))

    divides("tensor", c.num_attention_heads, "num_attention_heads")
    kinds = {*c.layer_kinds, *([c.mtp_layer_kind] if c.num_nextn_predict_layers else [])}
    if "gqa" in kinds:
        divides("tensor", c.num_key_value_heads, "num_key_value_heads")
    if "lightning" in kinds:
        divides("tensor", c.group_norm_size, "group_norm_size (no norm group may be cut)")
    divides("tensor", c.vocab_size, "vocab_size")
    if len(c.moe_layers) < c.num_hidden_layers:
        divides("tensor", c.intermediate_size, "intermediate_size")
    if c.num_shared_experts:
        divides("tensor", c.moe_shared_expert_intermediate_size, "moe_shared_expert_intermediate_size")
    if mesh.context > seq_len:
        found.append(Problem("context", mesh.context, f"at most the {seq_len} tokens of a row", seq_len))
    if c.moe_layers:
        divides("expert", c.num_experts, "num_experts")
        divides("expert", mesh.fsdp, "shard x context")
        divides("tensor", c.moe_intermediate_size, "moe_intermediate_size")
    elif mesh.expert > 1:
        found.append(Problem("expert", mesh.expert, "1: the model has no experts", 1))
    if mesh.pipeline > c.num_hidden_layers:
        most = c.num_hidden_layers
        found.append(Problem("pipeline", mesh.pipeline, f"at most num_hidden_layers = {most}", most))
    return found


def check(c: ModelConfig, mesh: Mesh, *, seq_len: int) -> None:
    """UserError for the first thing that cannot be cut."""
    for p in problems(c, mesh, seq_len=seq_len):
        raise UserError(
            "this mesh cannot cut the model or its rows",
            where=f"--mesh {p.axis}",
            value=p.value,
            expected=p.expected,
            nearest=None if p.nearest is None else f"{p.axis}={p.nearest}",
        )


def gathers(mesh: Mesh) -> tuple[Gather, ...]:
    """What training takes on the mesh: the stages of a pipeline reduce their gradients once a step."""
    return GATHERS if mesh.pipeline == 1 else ("accumulate",)


def check_gather(mesh: Mesh, gather: Gather | None) -> None:
    """UserError for one that training refuses there. None: whatever fits."""
    if gather is not None and gather not in gathers(mesh):
        raise UserError(
            "a pipeline keeps whole gradients through a step and nothing else",
            where="--gather",
            value=f"{gather} with --mesh pipeline={mesh.pipeline}",
            expected="accumulate, or no pipeline",
            nearest="--gather accumulate",
        )


def _close(value: int, allowed: list[int]) -> int:
    """The allowed degree nearest in ratio; the smaller of two equally near."""
    return min(allowed, key=lambda d: (abs(math.log(d / value)), d))


def meshes(c: ModelConfig, world: int, *, seq_len: int, node: int) -> list[Mesh]:
    """Every mesh of `world` ranks that divides the model and keeps tensor parallelism inside a node."""
    found = []
    for pipeline in divisors(world, c.num_hidden_layers):
        for tensor in divisors(world // pipeline, node):
            for context in divisors(world // pipeline // tensor, max(1, seq_len // 4096)):
                data = world // pipeline // tensor // context
                for replicate in divisors(data, data):
                    base = Mesh(pipeline, replicate, data // replicate, context, tensor)
                    for expert in divisors(math.gcd(base.fsdp, c.num_experts), c.num_experts) if c.moe_layers else [1]:
                        found.append(dataclasses.replace(base, expert=expert))
    return [mesh for mesh in found if not problems(c, mesh, seq_len=seq_len)]


def divisors(number: int, most: int | None = None) -> list[int]:
    """Rising, none above `most`."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted(d for d in {*small, *(number // d for d in small)} if most is None or d <= most)


def distance(a: Mesh, b: Mesh) -> float:
    """How far one mesh is from another: factors of two summed over the axes."""
    return sum(abs(math.log2(getattr(a, axis) / getattr(b, axis))) for axis in AXES)
