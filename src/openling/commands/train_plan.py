"""`openling train RECIPE --dry-run`: whether every stage's mesh can be; with --world N what each would hold, send and take there.

What is planned, and how, is `plan.job`. Here a recipe's settings become a job's, and what is refused has the recipe's names.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from openling.commands.gpus import add_rates, planned_device, planned_reserve
from openling.errors import UserError
from openling.plan.devices import DEVICES, Device
from openling.plan.mesh import AXES, Mesh

if TYPE_CHECKING:
    from openling.config.recipe import ParallelConfig, RecipeConfig, StageConfig
    from openling.model.config import ModelConfig
    from openling.parallel.mesh import Axes
    from openling.plan.job import TooLarge, TrainingPlan
    from openling.plan.setup import Followed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `openling train --dry-run`."""
    job = parser.add_argument_group("plan on many GPUs (with --dry-run)")
    job.add_argument("--world", type=int, metavar="N", help="ranks in all: plan every stage's memory, traffic and time on them")
    job.add_argument("--gpu", default="h100", help=f"kind of GPU: {', '.join(DEVICES)} (default: h100)")
    job.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of one GPU, 1 GB = 10^9 bytes")
    job.add_argument("--reserve", type=float, metavar="GIB", help="memory left for what is not counted")
    job.add_argument("--no-placement", action="store_true", help="leave out the tables of tensors")
    add_rates(parser)


def check_meshes(recipe: RecipeConfig, world: int | None) -> list[Axes]:
    """Every stage's axes; a `UserError` with the setting to change. Without a world they are as few ranks as can be."""
    from openling.train.rules import check_mesh, check_parts
    from openling.train.stages import first_config
    from openling.train.teacher import teacher_config

    if world is not None and world < 1:
        raise UserError("this has to be positive", where="--world", value=world, expected="a positive integer")
    config, _ = first_config(recipe, folder=False)
    teacher = teacher_config(recipe) if _teacher_is_there(recipe) else None
    found = []
    for stage in recipe.stages:
        c = recipe.parallel_of(stage)
        least = _least_world(c) if world is None else world
        axes = check_mesh(recipe, stage, config, least)
        if teacher is not None and stage.follows:
            check_mesh(recipe, stage, teacher, least, whose="the teacher: ")
        data = axes.data_replicate * axes.data_shard
        if world is not None or c.shard is not None or c.rest == "context":
            check_parts(stage, data, parallel=c, place=f"stages.{stage.name}.")
        found.append(axes)
    return found


def _least_world(c: ParallelConfig) -> int:
    """Ranks that the axes need, where the one that takes what is left may be whatever can be."""
    given, left = (c.shard or 1, 0) if c.rest == "context" else (c.context, c.shard)
    return c.pipeline * c.replicate * c.tensor * given * (left or c.expert // math.gcd(c.expert, given))


def plan_stages(recipe: RecipeConfig, args: argparse.Namespace) -> list[TrainingPlan]:
    """The plan of every stage on --world ranks, without which meshes are checked alone; a `UserError` where one cannot be."""
    from openling.train.stages import first_config, stage_config

    found, axes = [], check_meshes(recipe, args.world)
    if args.world is not None:
        gpu, reserve = planned_device(args, args.gpu, "--gpu"), planned_reserve(args)
        config, _ = first_config(recipe, folder=False)
        for stage, mine in zip(recipe.stages, axes, strict=True):
            config = stage_config(config, stage)
            found.append(_plan_stage(recipe, stage, config, mine, gpu, reserve))
    return found


def show_plans(recipe: RecipeConfig, plans: list[TrainingPlan], *, placement: bool) -> None:
    """Print them; the tables of tensors once for stages that share a mesh."""
    from openling.commands.migrate import open_console
    from openling.plan.show_job import show_job

    console = open_console()
    shown: set[Mesh] = set()
    for stage, plan in zip(recipe.stages, plans, strict=True):
        first = plan.setup.mesh not in shown
        show_job(plan, f"{recipe.name}, stage {stage.name}", placement=placement and first, console=console)
        for note in _left_out(recipe, stage):
            console.print(f"Not planned: {note}.\n", markup=False)
        shown.add(plan.setup.mesh)


def _plan_stage(
    recipe: RecipeConfig, stage: StageConfig, config: ModelConfig, axes: Axes, gpu: Device, reserve: int | None
) -> TrainingPlan:
    """The job that a stage is on these axes; a `UserError` with the settings to change where it does not fit."""
    from openling.plan.job import TooLarge, plan_training

    if stage.precision == "fp32":
        where = f"stages.{stage.name}.precision"
        near = f"--{where} bf16"
        raise UserError("only BF16 products are planned", where=where, value="fp32", expected="bf16 or auto", nearest=near)
    c = recipe.parallel_of(stage)
    if stage.accumulation < c.pipeline:  # which interleaved stages may have
        where, value = f"stages.{stage.name}.accumulation", stage.accumulation
        expected = f"{c.pipeline} or more: pipelines are planned with one stage a rank"
        raise UserError("a step has fewer parts than the pipeline has ranks", where=where, value=value, expected=expected)
    mesh = Mesh(axes.pipeline, axes.data_replicate, axes.data_shard, axes.context, axes.tensor, axes.expert)
    with _named(_place(stage)):
        try:
            return plan_training(
                config,
                world=mesh.world,
                mesh=mesh,
                seq_len=stage.sequence_length,
                batch_tokens=stage.batch_size * stage.sequence_length,
                micro_batch=stage.part_size // mesh.data,
                device=gpu,
                recompute=c.recompute,
                gather=c.gather,
                optimizer=stage.optimizer,
                reserve=reserve,
                teacher=_followed(recipe, stage),
            )
        except TooLarge as error:
            raise _too_large(stage, c, error, gpu) from error


def _followed(recipe: RecipeConfig, stage: StageConfig) -> Followed | None:
    """What a stage follows, where the teacher's folder is there."""
    from openling.plan.placement import inventory
    from openling.plan.setup import Followed
    from openling.train.teacher import teacher_config

    teacher = teacher_config(recipe) if stage.follows and _teacher_is_there(recipe) else None
    return None if teacher is None else Followed(inventory(teacher), stage.kl > 0, stage.align > 0)


def _teacher_is_there(recipe: RecipeConfig) -> bool:
    return recipe.model.teacher is not None and Path(recipe.model.teacher).exists()


def _left_out(recipe: RecipeConfig, stage: StageConfig) -> list[str]:
    """What of a stage's settings the plan leaves out."""
    found = []
    if recipe.parallel_of(stage).stages_per_rank > 1:
        found.append("stages_per_rank, one stage a rank is assumed")
    if stage.fp8_experts != "none":
        found.append("FP8 experts, their products are taken as BF16")
    if stage.follows and not _teacher_is_there(recipe):
        found.append("the teacher, whose folder is not there")
    if stage.trainable != ("",):
        found.append("frozen parameters, all are taken to train")
    return found


def _place(stage: StageConfig) -> str:
    """Where a stage's mesh is set."""
    return "parallel" if stage.parallel is None else f"stages.{stage.name}.parallel"


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Names of axes as the recipe has them, in errors of `parallel.mesh` and `plan.mesh`."""
    try:
        yield
    except UserError as error:
        where = str(error.parts["where"]).removeprefix("--mesh ").removeprefix("data_")
        if where not in AXES:
            raise
        near = error.parts["nearest"]
        near = near.partition("=")[2] if isinstance(near, str) else near
        parts = error.parts | {"where": f"{place}.{where}", "nearest": near}
        raise UserError(error.what, **parts) from error


def _too_large(stage: StageConfig, c: ParallelConfig, error: TooLarge, gpu: Device) -> UserError:
    """The same refusal with the recipe's settings: those that the nearest job that fits has otherwise."""
    better, what = error.better, f"stage {stage.name} does not fit{error.what.partition('does not fit')[2]}"
    stock = any(kind.memory == gpu.memory for kind in DEVICES.values())  # else --gpu-memory says how much there is
    larger = ", ".join(name for name, kind in DEVICES.items() if stock and kind.memory > gpu.memory)
    if better is None:
        more = f"GPUs with more memory: --gpu {larger}" if larger else "GPUs with more memory"
        return UserError(what, **error.parts | {"next": f"more ranks, or {more}"})
    mine = {axis: getattr(error.least.mesh, axis) for axis in AXES} | {"recompute": c.recompute, "gather": c.gather}
    theirs = {axis: getattr(better.mesh, axis) for axis in AXES} | {"recompute": better.recompute, "gather": better.gather}
    if c.rest == "context" or c.shard is None:
        del mine[c.rest]  # takes what the other axes leave
    changed = {
        f"stages.{stage.name}.parallel.{name}": (value, theirs[name]) for name, value in mine.items() if value != theirs[name]
    }
    if better.micro_batches != stage.accumulation:
        changed[f"stages.{stage.name}.accumulation"] = (stage.accumulation, better.micro_batches)
    return UserError(
        what,
        where=", ".join(changed),
        value=", ".join(str(old) for old, _ in changed.values()),
        expected=error.parts["expected"],
        nearest=" ".join(f"--{name} {new}" for name, (_, new) in changed.items()),
        next=f"with these, or for GPUs with more memory: --gpu {larger}" if larger else None,
    )
