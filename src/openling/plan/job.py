"""A training job on many GPUs, planned without any: `plan_training` is what `openling plan --world` prints.

The model is built on meta devices; a mesh that cannot carry it is refused with the setting to change and the nearest mesh that
can. `mesh="auto"` tries every mesh and keeps the fastest that fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from openling.errors import UserError
from openling.model import count
from openling.model.config import ModelConfig
from openling.plan import devices
from openling.plan import mesh as meshes
from openling.plan.activations import POLICIES, Policy
from openling.plan.devices import GIB, Device
from openling.plan.memory import LayerCosts, StageMemory, fullest, memory
from openling.plan.mesh import AXES, GATHERS, Gather, Mesh, Optimizer
from openling.plan.placement import Inventory, inventory
from openling.plan.roofline import StepTime, predict
from openling.plan.setup import Followed, Setup, default_reserve, stages

TOKENS_PER_RANK = 32768  # of the default batch
RUNNERS_UP = 5


@dataclass(frozen=True)
class Candidate:
    """A setup that was weighed: bytes of its fullest rank and, where they fit, its step."""

    setup: Setup
    bytes: int
    time: StepTime | None = None

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's bytes are within the device's memory."""
        return self.bytes <= self.setup.device.memory

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job; 0 if it does not fit."""
        return self.setup.batch_tokens / self.time.seconds if self.time else 0.0


@dataclass
class TrainingPlan:
    """A job that fits: where everything lies, what it holds and sends, and how long a step should take."""

    config: ModelConfig
    setup: Setup
    inventory: Inventory
    memory: list[StageMemory]
    time: StepTime
    policies: dict[Policy, int]
    runners_up: list[Candidate] = field(default_factory=list)
    tried: int = 0

    @property
    def fullest(self) -> StageMemory:
        """The stage whose ranks hold most."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job."""
        return self.setup.batch_tokens / self.time.seconds

    @property
    def model_flops(self) -> float:
        """FLOPs per token that MFU counts: 3 x `count.forward_flops` at half of seq_len; MTP and recomputation not counted."""
        return 3.0 * count.forward_flops(self.config, self.setup.seq_len // 2).total

    @property
    def mfu(self) -> float:
        """Share of the devices' printed peak that the model's own FLOPs make up."""
        return self.model_flops * self.tokens_per_second / self.setup.mesh.world / self.setup.device.peak

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints: every tensor, every part, every flow."""
        s, mesh = self.setup, self.setup.mesh
        stage_of = {layer: i for i, run in enumerate(self.inventory.stages(mesh.pipeline, s.seq_len)) for layer in run}
        last = mesh.pipeline - 1
        embeddings = [stage.index for stage in stages(self.inventory, s) if "embeddings" in stage.blocks]
        ends = {"model.word_embeddings.weight": embeddings}
        tensors = {
            t.name: t.placement(mesh) | {"stages": ends.get(t.name, [last]) if t.layer is None else [stage_of[t.layer]]}
            for t in self.inventory.tensors
        }
        return {
            "mesh": dataclasses.asdict(mesh) | {"world": mesh.world, "expert_shard": mesh.expert_fsdp},
            "device": dataclasses.asdict(s.device),
            "job": {
                name: getattr(s, name)
                for name in ("seq_len", "batch_tokens", "micro_batch", "micro_batches", "recompute", "gather", "optimizer")
            },
            "memory": [
                {"stage": m.stage, "total": m.total, "by_kind": m.by_kind(), "parts": [dataclasses.asdict(p) for p in m.parts]}
                for m in self.memory
            ],
            "total_by_recompute": self.policies,
            "traffic": [dataclasses.asdict(f) | {"bytes_per_step": f.bytes * f.calls} for f in self.time.flows],
            "step": {
                "seconds": self.time.seconds,
                "parts": self.time.parts,
                "bottleneck": self.time.bottleneck,
                "slowest_stage": self.time.slowest,
                "stage_seconds_per_micro_batch": self.time.stage_seconds,
                "tokens_per_second": self.tokens_per_second,
                "mfu": self.mfu,
                "model_flops_per_token": self.model_flops,
            },
            "runners_up": [
                {
                    "mesh": str(r.setup.mesh),
                    "recompute": r.setup.recompute,
                    "gather": r.setup.gather,
                    "bytes": r.bytes,
                    "tokens_per_second": r.tokens_per_second,
                }
                for r in self.runners_up
            ],
            "tensors": tensors,
        }


def plan_training(
    config: ModelConfig,
    *,
    world: int,
    mesh: str | Mesh = "auto",
    seq_len: int = 4096,
    batch_tokens: int | None = None,
    micro_batch: int = 1,
    device: str | Device = "h100",
    recompute: Policy | None = None,
    gather: Gather | None = None,
    optimizer: Optimizer = "adamw",
    reserve: int | None = None,
    teacher: Followed | None = None,
) -> TrainingPlan:
    """The plan of a job of `world` ranks; UserError if it cannot be.

    mesh: `parse_mesh`'s text, a Mesh, or "auto". batch_tokens: per optimiser step and all ranks (default: 32,768 per rank,
    rounded to what divides). recompute and gather: see `Setup`; None takes the fastest that fits. teacher: what
    a warm-up follows; then there is no pipeline.
    """
    given = {"--world": world, "--seq-len": seq_len, "--micro-batch": micro_batch, "--batch-tokens": batch_tokens}
    for name, value in given.items():
        if value is not None and value < 1:
            raise UserError("this has to be positive", where=name, value=value, expected="a positive integer")
    gpu = devices.device(device) if isinstance(device, str) else device
    if reserve is not None and not 0 <= reserve < gpu.memory:
        raise UserError(
            "this reserve leaves no memory", where="--reserve", value=_gib(reserve), expected=f"0 to {_gib(gpu.memory)}"
        )
    reserve = default_reserve(gpu) if reserve is None else reserve
    fixed = Setup(Mesh(), gpu, seq_len, 0, micro_batch, optimizer=optimizer, reserve=reserve, teacher=teacher)
    search = _Search(inventory(config), fixed, world, batch_tokens, recompute, gather)
    if mesh == "auto":
        return search.best()
    chosen = meshes.parse_mesh(mesh, world) if isinstance(mesh, str) else mesh
    meshes.check_gather(chosen, gather)
    return search.given(chosen)


class TooLarge(UserError):
    """A job that does not fit: the setup that needs least, and the nearest that fits, if one does."""

    def __init__(self, what: str, least: Setup, better: Setup | None, **parts: object) -> None:
        super().__init__(what, **parts)
        self.least, self.better = least, better


class _Search:
    """Weighs meshes for one model, device and batch."""

    def __init__(
        self, inv: Inventory, fixed: Setup, world: int, batch: int | None, recompute: Policy | None, gather: Gather | None
    ) -> None:
        self.inv, self.fixed, self.world, self.batch = inv, fixed, world, batch
        self.policies = (recompute,) if recompute else POLICIES
        self.gathers = (gather,) if gather else GATHERS
        self.costs = LayerCosts(inv)
        self.seconds: dict[object, dict[str, float]] = {}
        self.tried = 0

    def setups(self, mesh: Mesh) -> list[Setup]:
        """A mesh with every policy that is open and that training takes; none if the batch does not divide."""
        unit = self.fixed.seq_len * mesh.data * self.fixed.micro_batch
        batch = self.batch or max(mesh.pipeline, round(mesh.world * TOKENS_PER_RANK / unit)) * unit
        if batch % unit or batch < unit * mesh.pipeline:
            return []
        base = dataclasses.replace(self.fixed, mesh=mesh, batch_tokens=batch)
        gathers = [g for g in self.gathers if g in meshes.gathers(mesh)]
        return [dataclasses.replace(base, recompute=p, gather=g) for p in self.policies for g in gathers]

    def meshes(self) -> list[Mesh]:
        """All that divide the model; with a teacher without a pipeline, and that divide it too."""
        s = self.fixed
        found = meshes.meshes(self.inv.config, self.world, seq_len=s.seq_len, node=s.device.node)
        if s.teacher is None:
            return found
        c = s.teacher.inventory.config
        return [mesh for mesh in found if mesh.pipeline == 1 and not meshes.problems(c, mesh, seq_len=s.seq_len)]

    def weigh(self, setup: Setup) -> Candidate:
        """Its memory; its time too if it fits."""
        self.tried += 1
        most = fullest(self.inv, setup, self.costs)
        fits = most <= setup.device.memory
        return Candidate(setup, most, predict(self.inv, setup, self.seconds) if fits else None)

    def weigh_all(self, setups: list[Setup]) -> list[Candidate]:
        """Every policy on one mesh; the leanest first, and nothing after it where even that does not fit."""
        found: list[Candidate] = []
        for setup in sorted(setups, key=lambda x: (x.gather != "layer", -POLICIES.index(x.recompute))):
            found.append(self.weigh(setup))
            if not found[0].fits:
                break
        return found

    def best(self) -> TrainingPlan:
        """The fastest setup of every mesh that divides the model."""
        s = self.fixed
        possible = self.meshes()
        found = [x for mesh in possible for x in self.weigh_all(self.setups(mesh))]
        fitting = sorted((x for x in found if x.fits), key=lambda x: (-x.tokens_per_second, x.bytes))
        if fitting:
            return self.plan(fitting[0].setup, _different(fitting))
        if not found:
            raise UserError(
                "no mesh divides this model and batch",
                where="--batch-tokens" if self.batch else "--world",
                value=f"{self.batch or self.world:,}",
                expected=f"a multiple of {s.seq_len * s.micro_batch:,} tokens times some divisor of {self.world:,} ranks",
            )
        least = min(found, key=lambda x: x.bytes)
        raise UserError(
            f"no mesh of {self.world:,} ranks fits: the leanest needs {_gib(least.bytes)} of {_gib(s.device.memory)} per rank",
            where="--world",
            value=f"{self.world:,} ({least.setup.mesh}, recompute {least.setup.recompute})",
            expected=f"less per rank; its largest part: {self._largest(least.setup)}",
            next="more ranks (--world), --device h200, or a shorter --seq-len",
        )

    def given(self, mesh: Mesh) -> TrainingPlan:
        """The fastest policy on one mesh; refused if it cannot carry the model."""
        c = self.inv.config
        meshes.check(c, mesh, seq_len=self.fixed.seq_len)
        setups = self.setups(mesh)
        if not setups:
            dataclasses.replace(self.fixed, mesh=mesh, batch_tokens=self.batch or 0).check_batch()
        found = [self.weigh(setup) for setup in setups]
        fitting = sorted((x for x in found if x.fits), key=lambda x: (-x.tokens_per_second, x.bytes))
        if fitting:
            return self.plan(fitting[0].setup, [])
        raise self.refusal(mesh, min(found, key=lambda x: x.bytes))

    def refusal(self, mesh: Mesh, least: Candidate) -> TooLarge:
        """What is too large, and the nearest setup that fits."""
        s = least.setup
        what = f"this job does not fit: the fullest rank needs {_gib(least.bytes)} of {_gib(s.device.memory)}"
        largest = f"largest part: {self._largest(s)}"
        better = self.better(mesh, s)
        if better is None:
            where, value = "--world", f"{self.world:,} ({mesh})"
            return TooLarge(what, s, None, where=where, value=value, expected=largest, next="more ranks, or --device h200")
        if better.mesh == mesh:
            flags = {f"--{name.replace('_', '-')}": name for name in ("recompute", "gather", "micro_batch")}
            changed = [flag for flag, name in flags.items() if getattr(s, name) != getattr(better, name)]
            where, value = ", ".join(changed), ", ".join(str(getattr(s, flags[flag])) for flag in changed)
            nearest = " ".join(f"{flag} {getattr(better, flags[flag])}" for flag in changed)
            return TooLarge(what, s, better, where=where, value=value, expected=largest, nearest=nearest)
        axes = [axis for axis in AXES if getattr(mesh, axis) != getattr(better.mesh, axis)]
        policies = f"recompute {better.recompute}, gather {better.gather}"
        policies += f", micro-batch {better.micro_batch}" * (better.micro_batch != s.micro_batch)
        where, value = "--mesh " + ", ".join(axes), ", ".join(f"{axis}={getattr(mesh, axis)}" for axis in axes)
        return TooLarge(what, s, better, where=where, value=value, expected=largest, nearest=f"--mesh {better.mesh} ({policies})")

    def better(self, mesh: Mesh, least: Setup) -> Setup | None:
        """The nearest setup that fits: other policies on this mesh, then smaller micro-batches, then other meshes."""
        free = self
        for micro in reversed(meshes.divisors(self.fixed.micro_batch)):
            free = _Search(self.inv, dataclasses.replace(self.fixed, micro_batch=micro), self.world, self.batch, None, None)
            for setup in sorted(free.setups(mesh), key=lambda x: (POLICIES.index(x.recompute), x.gather != least.gather)):
                if free.weigh(setup).fits:
                    return setup
        return free.nearest(mesh)

    def nearest(self, mesh: Mesh) -> Setup | None:
        """The setup that fits on the mesh with the fewest changes; of those alike, the fastest."""
        by_distance: dict[float, list[Mesh]] = {}
        for other in self.meshes():
            by_distance.setdefault(round(meshes.distance(mesh, other), 6), []).append(other)
        for _, near in sorted(by_distance.items()):
            found = [x for other in near for x in self.weigh_all(self.setups(other)) if x.fits]
            if found:
                return max(found, key=lambda x: x.tokens_per_second).setup
        return None

    def plan(self, setup: Setup, runners_up: list[Candidate]) -> TrainingPlan:
        """Everything about a setup that fits."""
        totals = {policy: fullest(self.inv, dataclasses.replace(setup, recompute=policy), self.costs) for policy in POLICIES}
        parts = memory(self.inv, setup, self.costs)
        return TrainingPlan(self.inv.config, setup, self.inv, parts, predict(self.inv, setup), totals, runners_up, self.tried)

    def _largest(self, setup: Setup) -> str:
        rank = max(memory(self.inv, setup, self.costs), key=lambda m: m.total)
        kind, size = max(rank.by_kind().items(), key=lambda item: item[1])
        where = f" on stage {rank.stage + 1} of {setup.mesh.pipeline}" if setup.mesh.pipeline > 1 else ""
        return f"{kind}, {_gib(size)}{where}"


def _different(fitting: Iterable[Candidate]) -> list[Candidate]:
    """The best of every other mesh, in order, without those that only move a factor between replicate and shard."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for candidate in fitting:
        m = candidate.setup.mesh
        key = (m.pipeline, m.data, m.context, m.tensor, m.expert)
        if key not in seen:
            seen.add(key)
            found.append(candidate)
    return found[1 : RUNNERS_UP + 1]


def _gib(value: float) -> str:
    return f"{value / GIB:,.1f} GiB"
