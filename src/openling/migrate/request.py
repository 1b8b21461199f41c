"""What is asked of a migration, and what is refused of it before any weight is read: by a dry run as by the run itself."""

from __future__ import annotations

import os
from pathlib import Path

from openling.config.migrate import MigrateConfig, Stage, Warmup
from openling.errors import UserError
from openling.migrate.convert import check_mla
from openling.migrate.journal import run_folder
from openling.migrate.layout import lightning_stage, mla_stage, target_config
from openling.migrate.touched import trainable
from openling.model.config import ModelConfig
from openling.model.families import read_config
from openling.weights.folder import load_tokenizer
from openling.weights.io import check_outside, read_hf_config


def check_place(model: Path, out: Path, teacher: Path | None) -> None:
    """A `UserError` where `out` cannot appear."""
    if os.path.lexists(out):
        raise UserError("the output exists already", where=out, expected="a new folder", next="choose another, or remove it")
    check_outside(out, model, teacher or model)


def check_begun(run: Path, *, resume: bool) -> None:
    """A `UserError` where a run may not begin, or has nothing to go on from."""
    if resume and not run.exists():
        raise UserError("there is nothing to resume", where=run, expected="journal.json of an earlier run", next="omit --resume")
    if not resume and (run / "journal.json").exists():
        raise UserError("a migration to this folder was begun", where=run, next="add --resume, or remove that folder")
    # One that was killed before it had a journal had nothing yet: it begins, with --resume or without.
    if run.exists() and not (run / "journal.json").exists() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise UserError("the run folder holds something else", where=run, expected="a new folder", next="choose another OUT")


def config_of(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint folder."""
    return read_config(read_hf_config(folder), where=folder / "config.json")


class Request:
    """A model, where its hybrid goes, the stages on the way, and whom it follows; checked on configurations alone."""

    def __init__(self, model: Path, out: Path, config: MigrateConfig, teacher: Path | None) -> None:
        self.model, self.out, self.config, self.teacher_folder = model, out, config, teacher or model
        self.layout = config.layout  # selected MLA layers are named here once they are known
        self.run = run_folder(out)
        self.found, followed = config_of(model), config_of(self.teacher_folder)
        self.tokenizer = load_tokenizer(model, self.found)
        self.has_teacher = set(followed.layer_kinds) == {"gqa"}
        self._check_stages(self.found)
        self._check_teacher(self.found, followed)

    def _check_teacher(self, found: ModelConfig, followed: ModelConfig) -> None:
        if self.tokenizer is None:
            raise UserError(
                "calibration needs the model's tokenizer", where=self.model, expected="tokenizer.json", next="copy it there"
            )
        if self.teacher_folder != self.model and not self.has_teacher:
            kinds = sorted(set(followed.layer_kinds))
            raise UserError(
                "the teacher is converted itself", where=self.teacher_folder, value=kinds, expected="GQA in all layers"
            )
        follows = any(w.train.follows for w in (self.config.linear_warmup, self.config.mla_warmup))
        warm = {"linear-warmup", "mla-warmup"} & set(self.config.stages)
        if follows and warm and not self.has_teacher:
            raise UserError(
                "this warm-up follows a teacher (KL, alignment), and the model itself is already converted",
                where="--teacher",
                expected="the folder of the GQA model it came from",
                next="add --teacher FOLDER, or --preset paper, which needs none",
            )
        if found.vocab_size != followed.vocab_size:
            raise UserError(
                "the teacher has another vocabulary", where="vocab_size", value=followed.vocab_size, expected=found.vocab_size
            )
        theirs = load_tokenizer(self.teacher_folder, followed)
        if theirs is not None and theirs.get_vocab() != self.tokenizer.get_vocab():
            raise UserError("the teacher has another tokenizer", where=self.teacher_folder, expected=f"that of {self.model}")

    def _check_stages(self, config: ModelConfig) -> None:
        """Go through the stages on the configuration alone."""
        for stage in self.config.stages:
            if stage == "lightning":
                config = self._half(config)
            elif stage == "mla":
                config = self._full(config)
                check_mla(self.config.conversion, config)
            else:
                trainable(config, stage, "best", mtp=self._warmup(stage).train.mtp > 0)

    def _warmup(self, stage: Stage) -> Warmup:
        return self.config.linear_warmup if stage == "linear-warmup" else self.config.mla_warmup

    def _target(self, config: ModelConfig) -> ModelConfig:
        return target_config(config, **self.layout.model_dump())

    def _half(self, config: ModelConfig) -> ModelConfig:
        return lightning_stage(config, self.layout.model_dump())

    def _full(self, config: ModelConfig) -> ModelConfig:
        return mla_stage(config, self.layout.model_dump())
