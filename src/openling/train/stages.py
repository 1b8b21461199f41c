"""A recipe carried out: corpora built, stages trained one after the other, each written as a complete checkpoint folder.

    RUN/recipe.json      what is being done            RUN/corpora/NAME    tokenised texts that the recipe builds
    RUN/stages/NAME/     a stage's training run        RUN/models/NAME/    its checkpoint, in Hugging Face's layout

A stage begins with the training state of the one before: unrounded weights, optimiser moments, router biases. What it writes is
those weights, or the mean of its last checkpoints where the recipe merges. It has a mesh of its own, on which the model is made
anew and filled from that state. A run that is stopped anywhere goes on with `resume`.

On several ranks, all of which see the same folder, everyone trains and the main rank does the rest: corpora, records, folders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from openling.config.presets import PRESETS
from openling.config.recipe import RecipeConfig, StageConfig
from openling.data.build import BuildConfig
from openling.data.build import build as build_corpus
from openling.data.byte_tokenizer import byte_tokenizer
from openling.data.mixture import MixtureBatches
from openling.data.sources import parse_source
from openling.environment import commit, hardware, now, versions
from openling.errors import UserError
from openling.model.config import ModelConfig
from openling.model.families import read_config
from openling.model.ling import Ling, first_values
from openling.parallel.apply import Parallel, apply
from openling.parallel.fill import fill, give_memory
from openling.parallel.mesh import Mesh, build
from openling.train.checkpoint import checkpoints, damage, load_start, sole_writer, whole_checkpoint, write_json
from openling.train.loop import TrainResult, settled, train
from openling.train.ranks import Ranks, told
from openling.train.reading import open_checkpoint
from openling.train.rules import begun_stages, check_folders, check_mesh, check_same, check_stages, folders_read, read_record
from openling.train.teacher import check_tokens, fill_from, load_teacher
from openling.train.trackers import open_trackers
from openling.train.wsm import chosen_checkpoints, merge_into
from openling.weights.export import ling_config, save
from openling.weights.folder import load_tokenizer, open_folder
from openling.weights.io import CheckpointReader, read_hf_config


@dataclass(frozen=True)
class Outcome:
    """How far a recipe came: the checkpoint folders that are finished, and what stopped it."""

    models: list[Path]
    stopped: TrainResult | None


def first_config(recipe: RecipeConfig, *, folder: bool = True) -> tuple[ModelConfig, dict[str, Any] | None]:
    """The shape that training starts with, and the folder's config.json where there is one. `folder`: it must be there."""
    start = recipe.model
    if start.folder is not None and (folder or Path(start.folder).exists() or start.preset is None):
        hf = read_hf_config(start.folder)
        return read_config(hf, where=Path(start.folder) / "config.json"), hf
    assert start.preset is not None
    return read_config(PRESETS[start.preset]() | start.overrides, where="model"), None


def stage_config(config: ModelConfig, stage: StageConfig) -> ModelConfig:
    """The model's configuration in a stage: positions are always said, never inferred (YaRN, theta, longest context)."""
    changes: dict[str, Any] = {}
    if stage.rope_theta is not None:
        changes["rope_theta"] = stage.rope_theta
    if stage.yarn is not None:
        changes["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": stage.yarn.factor,
            "original_max_position_embeddings": stage.yarn.original,
        }
    rows = stage.sequence_length
    changes["max_position_embeddings"] = stage.max_position_embeddings or max(config.max_position_embeddings, rows)
    return config.replace(**changes)


class Pipeline:
    """One recipe in one run folder."""

    def __init__(
        self,
        recipe: RecipeConfig,
        run: Path,
        *,
        device: torch.device,
        command: str = "",
        say: Callable[[str], None] = lambda text: None,
        progress: bool | float = True,
    ) -> None:
        """Where torch.distributed is up, every rank makes one, with its own device."""
        self.recipe, self.run, self.device, self.command = recipe, run, device, command
        self.say, self.progress = say, progress
        self.checked: set[Path] = set()  # shards found sound; stages share most of them
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.meshes = self._meshes()
        # Others may wait for hours, while a corpus is built or a folder written.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if self.world > 1 else None

    def go(self, *, resume: bool = False) -> Outcome:
        """Everything that is not done yet; a stage that stops ends it."""
        told(lambda: check_stages(self.recipe, first_config(self.recipe)[0], self.world), self.group)
        with ExitStack() as stack:
            told(lambda: stack.enter_context(self._entered(resume)), self.group)
            self.tokenizer = self._tokenizer()
            if self.recipe.model.teacher is not None:
                check_tokens(self.recipe.model.teacher, self.tokenizer)
            told(self._build_corpora, self.group)
            config, _ = first_config(self.recipe)
            finished = told(lambda: [self._is_done(stage) for stage in self.recipe.stages], self.group)
            damaged = told(
                lambda: [d and self._is_damaged(s) for s, d in zip(self.recipe.stages, finished, strict=True)], self.group
            )
            # Refused before the first step, if at all; what finished stages read is not needed again.
            sources = [None if d else self._batches(s, config) for s, d in zip(self.recipe.stages, finished, strict=True)]
            before: list[Path] = []
            models: list[Path] = []
            for stage, batches, again in zip(self.recipe.stages, sources, damaged, strict=True):
                config = stage_config(config, stage)
                folder, out = self.run / "stages" / stage.name, self.run / "models" / stage.name
                if batches is not None:
                    result = self._train(config, stage, batches, folder, before)
                    if result.stopped == "signal":
                        return Outcome(models, result)
                    if result.stopped == "time":
                        self.say(f"  stopped by the clock ({stage.max_seconds:.0f} s) after step {result.steps}")
                last = whole_checkpoint(folder, self.say, self.group)
                if last is None:
                    raise UserError(
                        "a finished stage has no checkpoint, and what follows begins with it", where=folder / "checkpoints",
                        next=f"put it back, or continue from {out}: model.folder of a new recipe",
                    )  # fmt: skip
                before.append(last)
                if batches is not None or again:
                    told(partial(self._write, config, stage, folder, out, before), self.group)
                models.append(out)
        return Outcome(models, None)

    def _meshes(self) -> dict[str, Mesh | None]:
        """Each stage's mesh, by its name; stages with the same axes share one."""
        config, _ = first_config(self.recipe)
        wanted = {stage.name: check_mesh(self.recipe, stage, config, self.world) for stage in self.recipe.stages}
        if self.world == 1:
            return dict.fromkeys(wanted)
        built = {axes: build(axes, config, self.device.type) for axes in dict.fromkeys(wanted.values())}
        return {name: built[axes] for name, axes in wanted.items()}

    @contextmanager
    def _entered(self, resume: bool) -> Iterator[None]:
        path, begun = self.run / "recipe.json", begun_stages(self.run)
        if begun and not path.exists():
            raise UserError(
                "the record of this run is missing", where=path, value=f"stages of the run: {', '.join(sorted(begun))}",
                next="put recipe.json back, or choose a new --out",
            )  # fmt: skip
        if resume and not path.exists():
            raise UserError(
                "there is nothing to resume", where=self.run, expected="recipe.json of an earlier run",
                next="the same without --resume",
            )  # fmt: skip
        if not resume and begun:
            raise UserError(
                "the folder holds a run already", where=self.run, expected="a new folder", next="add --resume, or choose --out"
            )
        with sole_writer(self.run):
            fields = self.recipe.model_dump(mode="json")
            check_same(self.recipe, self.run)
            folders = folders_read(self.recipe)
            check_folders(folders, self.run)
            if "model.teacher" in folders and folders["model.teacher"] == folders.get("model.folder"):
                self.say("the teacher is the model itself: kl and align begin at 0")
            record = {
                "recipe": fields,
                "folders": folders,
                "command": self.command,
                "hardware": hardware(),
                "versions": versions(),
            }
            write_json(path, record | {"commit": commit(), "date": now()})
            yield

    def _tokenizer(self) -> Any:
        start = self.recipe.model
        if start.tokenizer == "bytes":
            return byte_tokenizer()
        folder = Path(start.tokenizer or start.folder or "")
        found = load_tokenizer(folder)
        if found is None:
            raise UserError("the folder has no tokenizer", where=folder, expected="tokenizer.json")
        return found

    def _build_corpora(self) -> None:
        if not (begun_stages(self.run) and (self.run / "tokenizer").exists()):
            self.tokenizer.save_pretrained(self.run / "tokenizer")
        for name, corpus in self.recipe.corpora.items():
            out = self.recipe.corpus_path(name, self.run)
            if corpus.build and not out.exists():  # one that is finished stands for itself, whatever became of its sources
                out.parent.mkdir(exist_ok=True)
                sources = tuple(parse_source(word, licences={}, languages={}) for word in corpus.build)
                build_corpus(BuildConfig(sources, filters=corpus.filters), out, self.tokenizer, say=self.say)

    def _batches(self, stage: StageConfig, config: ModelConfig) -> MixtureBatches:
        mesh = self.meshes[stage.name]
        placed = tuple(
            s.model_copy(update={"corpus": str(self.recipe.corpus_path(s.corpus, self.run))})
            if s.corpus in self.recipe.corpora
            else s
            for s in stage.mixture.sources
        )
        try:
            batches = MixtureBatches(
                stage.mixture.model_copy(update={"sources": placed}),
                rows=stage.batch_size,
                seed=stage.seed,
                rank=0 if mesh is None else mesh.data_rank,
                world=1 if mesh is None else mesh.data_ranks,
                steps=stage.total_steps,
                ramp=stage.stairs,
                vocab_size=config.vocab_size,
                tokenizer=self.tokenizer,
            )
            told(partial(batches.check_shards, self.checked), self.group)
            return batches
        except UserError as error:
            place = ", ".join(str(part) for part in (f"stages.{stage.name}", error.parts["where"]) if part is not None)
            raise UserError(error.what, **error.parts | {"where": place}) from error

    def _teacher(self, stage: StageConfig) -> str | None:
        """The folder of whom the stage follows."""
        return self.recipe.model.teacher if stage.follows else None

    def _is_done(self, stage: StageConfig) -> bool:
        """Whether the stage's checkpoint folder stands for all that is asked of it: a longer stage goes on, and so does one that
        the clock ended and that has another clock now. Nothing does on which the next stage has begun.
        """
        out = self.run / "models" / stage.name
        if not out.exists():
            return False
        trained = read_record(out / "openling.json", f"remove {out}: it is written again from the stage's checkpoints")
        if "steps" not in trained or trained["steps"] == stage.total_steps:
            return "steps" in trained
        names = [s.name for s in self.recipe.stages]
        followed = bool(begun_stages(self.run) & set(names[names.index(stage.name) + 1 :]))
        further = max(checkpoints(self.run / "stages" / stage.name), default=0) > trained["steps"]  # it went on and was killed
        same = trained.get("max_seconds") == stage.max_seconds and not further
        if stage.max_seconds is None or not (followed or same):
            return False
        done = f"{trained['steps']:,} of {stage.total_steps:,} steps"
        self.say(f"stage {stage.name} was ended by its clock (max_seconds = {stage.max_seconds:g}): {done}")
        return True

    def _is_damaged(self, stage: StageConfig) -> bool:
        """Whether files of a finished stage's folder were cut short or are gone, as headers and index tell; a `UserError` where
        the checkpoints that it was made of cannot give it again.
        """
        out, folder = self.run / "models" / stage.name, self.run / "stages" / stage.name
        try:
            CheckpointReader(out)
            return False
        except UserError as error:
            wrong = error
        record, there = read_record(out / "openling.json", f"copy {out} again"), checkpoints(folder)
        made_of = [one["step"] for one in record.get("merged", [])] or [record["steps"]]
        gone = [n for n in made_of if n not in there or damage(there[n])]
        place = wrong.parts["where"]
        if gone:
            rest = "makes it from the checkpoints that are left" if there else "trains the stage again"
            raise UserError(
                f"a finished stage's folder is damaged ({wrong.what}), and not every checkpoint that it was made of is whole",
                where=place, value=f"without step {', '.join(map(str, gone))}", expected=f"{folder}/checkpoints/step_{gone[0]}",
                next=f"put back either of them, or remove {out}: the same command then {rest}",
            )  # fmt: skip
        self.say(f"stage {stage.name} is finished, but {wrong.what}: {place}; its folder is written again from its checkpoint")
        return True

    def _model(self, config: ModelConfig, before: list[Path], device: torch.device) -> Ling:
        """The whole model in FP32 as the stage before left it, with this stage's configuration."""
        with torch.device("meta"):
            parallel = Parallel(Ling(config), None, {})
        self._fill(parallel, before, device)
        return parallel.model

    def _fill(self, parallel: Parallel, before: list[Path], device: torch.device) -> None:
        """Weights of the stages before, or those that training starts with, for a model on "meta"."""
        model, start = parallel.model, self.recipe.model
        give_memory(parallel, device)
        trained = open_checkpoint(before[-1]).shapes if before else {}
        if all(f"model/{name}" in trained for name, _ in model.named_parameters()):
            before = before[-1:]
        elif start.folder is not None:
            fill_from(open_folder(start.folder), parallel, device)
        else:
            # Drawn where training runs, whatever is filled: devices draw differently.
            generator, std = torch.Generator(self.device).manual_seed(self.recipe.seed), model.config.initializer_range
            fill(parallel, lambda name, shape: first_values(name, torch.empty(shape, device=self.device), std, generator))
        for checkpoint in before:
            load_start(checkpoint, model, ranks=Ranks(parallel))

    def _train(
        self, config: ModelConfig, stage: StageConfig, batches: MixtureBatches, folder: Path, before: list[Path]
    ) -> TrainResult:
        self.say(
            f"stage {stage.name}: {stage.total_steps:,} steps, {stage.total_tokens:,} tokens, rows of {stage.sequence_length}"
        )
        run = told(lambda: settled(stage.run(), self.device, folder), self.group)
        dtype = torch.bfloat16 if run.precision == "bf16" else None
        c = self.recipe.parallel_of(stage)
        with torch.device("meta"):
            model = Ling(config)
        if c.pipeline > 1:  # whose stages are no part of the model, so that memory must be there before they are cut
            model = self._model(config, before, self.device)
        parallel = apply(
            model, self.meshes[stage.name], recomputing=c.recompute, model_dtype=dtype, gather=c.gather,
            stages_per_rank=c.stages_per_rank, seq_len=stage.sequence_length,
        )  # fmt: skip
        if c.pipeline == 1:
            self._fill(parallel, before, self.device)
        ranks, teacher = Ranks(parallel), None
        if (leader := self._teacher(stage)) is not None:
            mesh, length = self.meshes[stage.name], stage.sequence_length
            teacher = load_teacher(leader, mesh, self.device, model_dtype=dtype, seq_len=length)

        def begin() -> bool:
            folder.mkdir(parents=True, exist_ok=True)
            tied = {"tie_word_embeddings": config.tie_word_embeddings}  # of what trains; folders hold the head itself
            write_json(folder / "config.json", ling_config(config, torch.float32) | tied)
            return (folder / "train.json").exists()

        resume, name = ranks.told(begin), f"{self.recipe.name}-{stage.name}"
        fields = stage.model_dump(mode="json")
        return train(
            parallel.model,
            run,
            batches,
            parameters=stage.trainable,
            run=folder,
            teacher=teacher,
            resume=resume,
            progress=self.progress,
            start=before[-1] if before else None,
            ranks=ranks,
            trackers=open_trackers(self.recipe.trackers, folder, name, fields) if ranks.main else (),
        )

    def _write(self, config: ModelConfig, stage: StageConfig, folder: Path, out: Path, before: list[Path]) -> None:
        """The stage's checkpoint folder; a shorter one of the same stage gives way."""
        out.parent.mkdir(exist_ok=True)
        dtype = getattr(torch, self.recipe.model.dtype)
        state = read_record(before[-1] / "state.json", f"remove {before[-1]}, and --resume goes on from the one before")
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
        about = {"recipe": self.recipe.name, "stage": stage.name, "steps": state["step"], "tokens": state["tokens"]}
        about |= {"loss": json.loads(lines[-1])["loss"] if lines else None, "command": self.command or None}
        if state["step"] < stage.total_steps:
            about["max_seconds"] = stage.max_seconds  # what has ended it
        if (teacher := self._teacher(stage)) is not None:
            about["teacher"] = teacher
        companions = self.run / "tokenizer"
        source = self.recipe.model.folder
        title = f"{self.recipe.name}-{stage.name}"
        model = self._model(config, before, torch.device("cpu"))
        if stage.merge is not None:
            about |= merge_into(model, chosen_checkpoints(folder, last=stage.merge.last), stage.merge.weights)
        preset = None if source is not None else PRESETS[str(self.recipe.model.preset)]() | self.recipe.model.overrides
        shutil.rmtree(out, ignore_errors=True)
        save(
            model.eval(), out, dtype=dtype, source=source, hf_config=preset, provenance=about, name=title, companions=companions
        )  # fmt: skip
        self.say(f"  wrote {out}")
