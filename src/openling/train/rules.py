"""What is refused before a recipe's first step, and what may differ when its run goes on.

A stage may come days after the first, so whatever its settings alone can tell is told at once.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from openling.config.recipe import ParallelConfig, RecipeConfig, StageConfig
from openling.config.train import TrainConfig
from openling.errors import UserError
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.parallel.mesh import Axes, check, fit
from openling.parallel.pipeline import check_count, check_runs
from openling.plan.mesh import divisors
from openling.train.checkpoint import checkpoints
from openling.train.optim import select_names
from openling.train.teacher import check_teacher, teacher_config
from openling.train.trackers import check_trackers
from openling.weights.files import fingerprint
from openling.weights.merge import coefficients

SEARCHED = 100  # multiples of the data ranks on either side of a ramp's start
OTHERWISE = "the same setting as before, or train into a new folder"
# Changes of these do not change what was trained so far, or are looked at part by part: stages, and corpora, what they hold being
# in the fingerprint of the batches.
FREE_ON_RESUME = ("stages", "trackers", "parallel", "corpora")


def check_losses(config: TrainConfig, model: ModelConfig, *, teacher: bool, place: str = "") -> None:
    """A `UserError` where a loss lacks what it needs. place: what stands before a setting's name."""
    term, weight = ("kl", config.kl) if config.kl else ("align", config.align)
    if weight and not teacher:
        fix = "0, or a checkpoint folder as model.teacher" if place else f"a teacher, or {term} = 0"
        raise UserError("this loss needs a teacher", where=place + term, value=weight, expected=fix)
    if config.mtp and not model.num_nextn_predict_layers:
        raise UserError("the model has no MTP layer", where=f"{place}mtp", value=config.mtp, expected=0)
    if config.mtp_steps and config.mtp_steps < model.num_nextn_predict_layers:
        least = model.num_nextn_predict_layers
        raise UserError(
            "there are fewer MTP steps than MTP layers", where=f"{place}mtp_steps", value=config.mtp_steps, expected=least
        )


def check_parts(config: TrainConfig, data_ranks: int, *, parallel: ParallelConfig | None = None, place: str = "") -> None:
    """A `UserError` where data ranks cannot have equal rows of every part. parallel: of whose pipeline the nearest takes heed."""
    least = parallel.pipeline if parallel is not None and parallel.stages_per_rank == 1 else 1
    if config.part_size % data_ranks:
        rows = max(1, round(config.batch_size / data_ranks))  # of a data rank
        rows += -rows % least if least > rows else 0
        parts = min((n for n in divisors(rows) if n >= least), key=lambda n: abs(math.log(n / config.accumulation)))
        near = {"batch_size": rows * data_ranks, "accumulation": parts}
        raise UserError(
            "the rows of a part cannot be shared evenly",
            where=f"{place}batch_size / accumulation",
            value=f"{config.batch_size:,} / {config.accumulation:,} = {config.part_size:,} rows a part",
            expected=f"parts of a multiple of {data_ranks:,} rows, one for each data rank",
            nearest=_settings({name: value for name, value in near.items() if value != getattr(config, name)}, place),
        )
    for _, rows in config.stairs:
        if rows % data_ranks:
            raise UserError(
                "the rows of a smaller first batch cannot be shared evenly", where=f"{place}ramp", value=rows,
                expected=f"a multiple of {data_ranks} data ranks",
                nearest=_settings({"ramp.start": _shared_start(config, data_ranks)}, place),
            )  # fmt: skip


def _shared_start(config: TrainConfig, data_ranks: int) -> int:
    """The nearest start of a ramp all of whose batches data ranks can share, else that of whole parts, which is one."""
    assert config.ramp is not None
    start, room = config.ramp.start, SEARCHED * data_ranks
    first = max(data_ranks, (start - room) // data_ranks * data_ranks)
    near = range(first, min(config.part_size, start + room), data_ranks)
    for rows in sorted(near, key=lambda n: abs(n - start)):
        ramp = config.ramp.model_copy(update={"start": rows})
        if all(n % data_ranks == 0 for _, n in config.model_copy(update={"ramp": ramp}).stairs):
            return rows
    return config.part_size


def _settings(values: dict[str, int], place: str) -> str:
    """As flags of a recipe, or as fields in Python."""
    return " ".join(f"--{place}{name} {value}" if place else f"{name} = {value}" for name, value in values.items())


def check_alone(parallel: ParallelConfig, world: int, *, place: str = "parallel") -> None:
    """A `UserError` where one process is to do what takes several."""
    for axis in ("pipeline", "replicate", "shard", "context", "tensor", "expert"):
        size = getattr(parallel, axis)
        if world == 1 and size is not None and size > 1:
            raise UserError(
                "this takes more ranks than one", where=f"{place}.{axis}", value=size, expected="1, as in every single process",
                next="torchrun --nproc-per-node N -m openling train RECIPE ... starts N",
            )  # fmt: skip


def check_mesh(recipe: RecipeConfig, stage: StageConfig, model: ModelConfig, world: int, *, whose: str = "") -> Axes:
    """A stage's axes in such a world, `data_shard` filled in; a `UserError` with the setting that cannot be.

    whose: what a refusal begins with, for a model that is not the recipe's own.
    """
    c = recipe.parallel_of(stage)
    place = "parallel" if stage.parallel is None else f"stages.{stage.name}.parallel"
    if stage.follows and c.pipeline > 1:
        raise UserError("teachers are not cut into pipeline stages", where=f"{place}.pipeline", value=c.pipeline, expected=1)
    check_alone(c, world, place=place)
    try:
        axes = fit(Axes(c.pipeline, c.replicate, *c.leaving(world), c.tensor, c.expert), world)
        check(axes, model)
        if axes.pipeline > 1:
            check_runs(model.num_hidden_layers, axes.pipeline, c.stages_per_rank)
            for _, rows in (*stage.stairs, (0, stage.batch_size)):
                check_count(max(1, rows // stage.part_size), axes.pipeline, c.stages_per_rank)
    except UserError as error:  # which has Python's names of the axes
        name = str(error.parts["where"]).removeprefix("data_")
        raise UserError(whose + error.what.replace("data_", ""), **error.parts | {"where": f"{place}.{name}"}) from error
    if axes.context > stage.sequence_length:
        raise UserError(
            "rows are shorter than there are ranks to share them", where=f"{place}.context", value=axes.context,
            expected=f"at most {stage.sequence_length:,}",
            nearest=None if c.rest == "context" else stage.sequence_length,
            next="more shard ranks, or fewer ranks in all" if c.rest == "context" else None,
        )  # fmt: skip
    return axes


def check_stages(recipe: RecipeConfig, model: ModelConfig, world: int | None = None) -> None:
    """Trackers, and all of a recipe's stages: losses, what trains, what is merged; with a world their meshes and ranks' rows too.

    The teacher's shape is looked at where its folder is there.
    """
    check_trackers(recipe.trackers)
    folder = recipe.model.teacher
    if folder is not None and not any(stage.follows for stage in recipe.stages):
        fix = "kl or align of a stage above 0, or no teacher"
        raise UserError("no stage follows the teacher", where="model.teacher", value=folder, expected=fix)
    teacher = teacher_config(recipe) if folder is not None and (world is not None or Path(folder).exists()) else None
    if teacher is not None:
        check_teacher(recipe, model, teacher)
    for stage in recipe.stages:
        place = f"stages.{stage.name}."
        check_losses(stage, model, teacher=folder is not None, place=place)
        if world is not None:
            axes = check_mesh(recipe, stage, model, world)
            if teacher is not None and stage.follows:
                check_mesh(recipe, stage, teacher, world, whose="the teacher: ")
            parallel = recipe.parallel_of(stage)
            check_parts(stage, axes.data_replicate * axes.data_shard, parallel=parallel, place=place)
        if stage.trainable != ("",):
            with torch.device("meta"):
                select_names([name for name, _ in Ling(model).named_parameters()], stage.trainable, where=f"{place}trainable")
        if stage.merge is not None:
            _check_merge(stage, place)


def _check_merge(stage: StageConfig, place: str) -> None:
    merge = stage.merge
    assert merge is not None
    coefficients(merge.weights, merge.last, where=f"{place}merge.weights")
    most = most_kept(stage)
    if most < merge.last:
        raise UserError(
            "the stage keeps fewer checkpoints than are to be merged", where=f"{place}merge.last", value=merge.last,
            expected=f"at most {most}, by keep_last = {stage.keep_last} and keep_every = {stage.keep_every}",
            next=f"keep_last = {merge.last}, or a keep_every of which {merge.last} multiples are in the stage's steps",
        )  # fmt: skip


def most_kept(config: TrainConfig) -> int:
    """How many checkpoints a finished run can have left, as `Saver` prunes them: exactly so many where no clock saves, too.

    The last `keep_last`, with the run's last step, and multiples of `keep_every` before them.
    """
    total = config.total_steps
    apart = 1 if config.checkpoint_seconds is not None else config.checkpoint_steps or total  # the clock may save at any step
    saved = -(-total // apart)
    if saved <= config.keep_last:
        return saved
    first = total if config.keep_last == 1 else apart * (saved - config.keep_last + 1)  # of the last few
    return config.keep_last + ((first - 1) // config.keep_every if config.keep_every else 0)


def read_record(path: Path, fix: str) -> dict[str, Any]:
    """A JSON object that a run keeps about itself; a `UserError` where it is damaged. fix: what to do then."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError("a record of the run cannot be read", where=path, value=error, expected="JSON", next=fix) from error
    if not isinstance(found, dict):
        raise UserError("a record of the run cannot be read", where=path, value=str(found)[:40], expected="an object", next=fix)
    return found


def begun_stages(run: Path) -> set[str]:
    """Stages of which a step may have been taken."""
    return {path.name for path in run.glob("stages/*") if (path / "train.json").exists() or checkpoints(path)}


def check_recorded(run: Path) -> None:
    """A `UserError` where checkpoints have lost the record of the settings that they were trained with. run: a stage's folder."""
    path = run / "train.json"
    if checkpoints(run) and not path.exists():
        raise UserError(
            "the record of what these checkpoints were trained with is missing", where=path,
            value=f"checkpoints/{list(checkpoints(run).values())[-1].name} and no train.json",
            next=f"put it back, or remove {run} and train again",
        )  # fmt: skip


def folders_read(recipe: RecipeConfig) -> dict[str, str]:
    """By setting, what tells whether a checkpoint folder that training reads is still the same."""
    named = {"model.folder": recipe.model.folder, "model.teacher": recipe.model.teacher}
    return {name: fingerprint(Path(folder)) for name, folder in named.items() if folder is not None}


def check_folders(now: dict[str, str], run: Path) -> None:
    """A `UserError` where a folder that a begun run reads holds another model: checkpoints lack what is frozen."""
    path = run / "recipe.json"
    before = read_record(path, f"put it back, or remove {run} and train again").get("folders", {}) if begun_stages(run) else {}
    for name, found in now.items():
        if name in before and before[name] != found:
            raise UserError(
                "the folder holds another model than when this run began", where=name, value=found[:16],
                expected=before[name][:16],
                next="put the old files back, or train into a new folder",
            )  # fmt: skip


def check_same(recipe: RecipeConfig, run: Path) -> None:
    """A `UserError` where the recipe asks otherwise for what this run has begun. Before the first stage all may change."""
    path = run / "recipe.json"
    begun = begun_stages(run)
    if not begun and not path.exists():
        return
    old = read_record(path, f"put it back, or remove {run} and train again").get("recipe")
    if not isinstance(old, dict):
        raise UserError("the run's record has no recipe", where=path, next=f"put it back, or remove {run} and train again")
    _check_corpora(recipe, old, run)
    if not begun:
        return
    mine = recipe.model_dump(mode="json")
    for name in mine.keys() - set(FREE_ON_RESUME):
        if found := _difference(mine[name], old.get(name), name):
            where, value, before = found
            what = "the recipe has changed since this run began"
            raise UserError(what, where=where, value=value, expected=before, next=OTHERWISE)
    stages = {stage["name"]: stage for stage in old.get("stages", []) if stage["name"] in begun}
    names = [stage.name for stage in recipe.stages]
    if names[: len(stages)] != list(stages):
        raise UserError(
            "the order of the stages has changed since this run began", where="stages", value=", ".join(names),
            expected=", ".join([*stages, "..."]), next="add stages behind those that have begun, or train into a new folder",
        )  # fmt: skip
    for stage in recipe.stages[: len(stages)]:
        _check_stage(stage, stages[stage.name], run, followed=stage.name != list(stages)[-1])
        if not (run / "models" / stage.name).exists():  # one that is finished is compared with recipe.json alone
            check_recorded(run / "stages" / stage.name)


def _difference(mine: Any, old: Any, where: str) -> tuple[str, Any, Any] | None:
    """The first place where two settings differ, with both values."""
    if isinstance(mine, dict) and isinstance(old, dict):
        parts = (_difference(mine.get(key), old.get(key), f"{where}.{key}") for key in mine | old)
        return next((part for part in parts if part), None)
    return None if mine == old else (where, mine, old)


def _check_corpora(recipe: RecipeConfig, old: dict[str, Any], run: Path) -> None:
    """What the run built for itself must be what the recipe says."""
    for name, corpus in recipe.corpora.items():
        before, folder = old.get("corpora", {}).get(name), recipe.corpus_path(name, run)
        if corpus.build and before is not None and folder.exists():
            found = _difference(corpus.model_dump(mode="json"), before, f"corpora.{name}")
            if found:
                raise UserError(
                    "the run has built this corpus from something else", where=found[0], value=found[1], expected=found[2],
                    next=f"remove {folder} and {folder}.run, or give the corpus another name",
                )  # fmt: skip


def _check_stage(stage: StageConfig, old: dict[str, Any], run: Path, *, followed: bool) -> None:
    """One that has begun. followed: so has the next, with its weights."""
    folder, place = run / "stages" / stage.name, f"stages.{stage.name}"
    different = stage.differences(old)
    for name in ("mixture", "parallel"):  # the one is looked at below, the other changes nothing that was trained
        different.pop(name, None)
    if not (run / "models" / stage.name).exists() or (stage.steps, stage.tokens) != (old.get("steps"), old.get("tokens")):
        different.pop("merge", None)  # nothing is merged yet, or is again
    elif "merge" in different:
        value, before = different["merge"]
        again = f"openling merge {folder} OUT --last N --weights HOW"
        raise UserError("the stage is merged already", where=f"{place}.merge", value=value, expected=before, next=again)
    for name, (value, before) in different.items():
        raise UserError(
            "the stage has begun with another setting", where=f"{place}.{name}", value=value, expected=before, next=OTHERWISE
        )
    if found := _difference(_read(stage.model_dump(mode="json")), _read(old), f"{place}.mixture"):
        where, value, before = found
        raise UserError("the stage has begun with another mixture", where=where, value=value, expected=before, next=OTHERWISE)
    _check_length(stage, old, max(checkpoints(folder), default=0), followed=followed)


def _read(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage's mixture without where corpora lie and how often they may be repeated, and without what nobody has set."""
    mixture = dict(stage["mixture"])
    sources = mixture["sources"]
    mixture["sources"] = [{k: v for k, v in s.items() if k not in ("corpus", "repeat") and v is not None} for s in sources]
    return mixture


def _check_length(stage: StageConfig, old: dict[str, Any], trained: int, *, followed: bool) -> None:
    place = f"stages.{stage.name}"
    if followed:
        # The clock of a stage that came to its end has changed nothing.
        for name in ("steps", "tokens", *(("max_seconds",) if trained < stage.total_steps else ())):
            value, before = getattr(stage, name), old.get(name)
            if value != before:
                again = "the same as before, or remove the later stages from stages/ and models/ of the run: they begin anew"
                raise UserError(
                    "the next stage has begun where this one ended", where=f"{place}.{name}", value=value, expected=before,
                    next=again if name == "max_seconds" else "add a stage behind the others, or train into a new folder",
                )  # fmt: skip
    elif trained > stage.total_steps:
        raise UserError(
            "the stage has trained for longer than that", where=f"{place}", value=f"{stage.total_steps} steps",
            expected=f"{trained} or more",
        )  # fmt: skip
