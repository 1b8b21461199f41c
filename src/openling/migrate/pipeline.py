"""A migration from folder to folder: stages in order, each a complete checkpoint, a journal between them.

`OUT.run/` holds the run: `journal.json` (what is done), `report.json` (what was measured), `stages/NAME` (the last finished
stage's checkpoint), `NAME/` (a warm-up's training run). The finished checkpoint becomes `OUT` by one rename. A run that is
killed anywhere resumes with its last finished stage, inside a warm-up with its last training checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openling.config.migrate import MigrateConfig, Stage, Warmup, preset
from openling.data.corpus import Part, find_corpus, mixture
from openling.data.pack import Batches, cut_windows, tokenise
from openling.environment import commit, hardware, now, versions
from openling.errors import Failure, UserError
from openling.migrate.convert import Approximation, to_lightning, to_mla
from openling.migrate.layout import group_size_reason, stage_kinds, target_config
from openling.migrate.measurer import Measurer
from openling.migrate.plan import load_config, plan
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.train.checkpoint import sole_writer, write_json
from openling.train.loop import train
from openling.weights.export import save
from openling.weights.folder import load
from openling.weights.io import CheckpointReader

WINDOWS_PER_BATCH = 8


@dataclass
class Events:
    """How a run tells its listener: a line of text, and progress inside a conversion (stage, layer, layers)."""

    say: Callable[[str], None] = lambda text: None
    layer: Callable[[str, int, int], None] = lambda stage, layer, layers: None


@dataclass
class Checkpoint:
    """A model in FP32, and the dtype its folder stores."""

    model: Ling
    config: ModelConfig
    tokenizer: Any
    folder: Path
    stored: torch.dtype


def _load(folder: Path, device: torch.device) -> Checkpoint:
    loaded = load(folder, device=device)
    stored = loaded.model.lm_head.weight.dtype
    return Checkpoint(loaded.model.float(), loaded.config, loaded.tokenizer, folder, stored)


def run_folder(out: Path) -> Path:
    """Where the run of a migration to `out` is kept."""
    return out.with_name(out.name + ".run")


def migrate(
    model: Path,
    out: Path,
    config: MigrateConfig,
    *,
    teacher: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    command: str = "",
    events: Events | None = None,
) -> Path:
    """Run `config.stages` from the checkpoint `model` to the new folder `out`; returns the run folder.

    `teacher` is the model to agree with, by default `model` itself when it is all GQA. `model` is only ever read.
    """
    run = run_folder(out)
    if out.exists():
        raise UserError("the output exists already", where=out, expected="a new folder", next="choose another, or remove it")
    fingerprint = _fingerprint(model)
    journal_path = run / "journal.json"
    if resume and not journal_path.exists():
        raise UserError("there is nothing to resume", where=run, expected="journal.json of an earlier run", next="omit --resume")
    if not resume and journal_path.exists():
        raise UserError("a migration to this folder was begun", where=run, next="add --resume, or remove that folder")
    with sole_writer(run):
        journal = {"model": str(model), "fingerprint": fingerprint, "config": config.model_dump(mode="json"), "done": []}
        if resume:
            journal = _same_journal(json.loads(journal_path.read_text()), journal, run)
        write_json(journal_path, journal)
        _Migration(model, out, config, teacher, device, command, events or Events(), journal).go()
    return run


def _same_journal(old: dict[str, Any], new: dict[str, Any], run: Path) -> dict[str, Any]:
    for key in ("fingerprint", "config"):
        if old[key] != new[key]:
            what = {"fingerprint": "the source model has changed", "config": "the settings have changed"}[key]
            where = next((k for k in new["config"] if key == "config" and old["config"].get(k) != new["config"][k]), new["model"])
            raise UserError(f"{what} since this run began", where=where, expected="the same", next=f"undo that, or remove {run}")
    return old


def _fingerprint(folder: Path) -> str:
    """Names, sizes and headers of the source's weights, and its config: enough to notice another model."""
    reader = CheckpointReader(folder)
    tensors = [(name, list(reader.shape(name)), str(reader.dtype(name))) for name in sorted(reader.names())]
    files = sorted((p.name, p.stat().st_size) for p in reader.folder.glob("*.safetensors"))
    text = json.dumps([tensors, files]) + (reader.folder / "config.json").read_text()
    return hashlib.sha256(text.encode()).hexdigest()


class _Migration:
    """One run in progress."""

    def __init__(
        self,
        model: Path,
        out: Path,
        config: MigrateConfig,
        teacher: Path | None,
        device: str,
        command: str,
        events: Events,
        journal: dict[str, Any],
    ) -> None:
        self.model, self.out, self.config = model, out, config
        self.device, self.command, self.events, self.journal = torch.device(device), command, events, journal
        self.run = run_folder(out)
        self.bf16 = True
        self.source = _load(model, self.device)
        self.teacher = self.source if teacher is None else _load(teacher, self.device)
        self.has_teacher = set(self.teacher.config.layer_kinds) == {"gqa"}
        self._check_before()
        tokens = self._tokens()
        self.calibration = self._batches_of(tokens[: config.text.calibration_tokens], "calibration text")
        self.training = cut_windows(tokens, config.text.sequence_length, where="training text")
        self.measurer = Measurer(self.teacher.model, self.source.tokenizer, self._evaluation(), bf16=self.bf16)

    def _check_before(self) -> None:
        """What can be refused before any work is done."""
        if self.source.tokenizer is None:
            raise UserError(
                "calibration needs the model's tokenizer", where=self.model, expected="tokenizer.json", next="copy it there"
            )
        kl = any(w.train.kl for w in (self.config.linear_warmup, self.config.mla_warmup))
        warm = {"linear-warmup", "mla-warmup"} & set(self.config.stages)
        if kl and warm and not self.has_teacher:
            raise UserError(
                "this warm-up follows a teacher (KL), and the model itself is already converted",
                where="--teacher",
                expected="the folder of the GQA model it came from",
                next="add --teacher FOLDER, or --preset paper, which needs none",
            )
        if self.source.config.vocab_size != self.teacher.config.vocab_size:
            found, expected = self.source.config.vocab_size, self.teacher.config.vocab_size
            raise UserError("the teacher has another vocabulary", where="vocab_size", value=found, expected=expected)
        size = sum(p.numel() * p.element_size() for p in self.source.model.parameters())
        free = shutil.disk_usage(self.run).free
        if free < 3 * size:
            raise UserError("no space left for the run", where=self.run, value=f"{free:,} bytes free", expected=f"{3 * size:,}")

    def _tokens(self) -> np.ndarray:
        text, c = self.config.text, self.config
        warm = [w.train.tokens or 0 for w in (c.linear_warmup, c.mla_warmup)]
        wanted = max(text.calibration_tokens, *warm)
        documents = mixture(text.calibration, "train")
        return tokenise(documents, self.source.tokenizer, vocab_size=self.source.config.vocab_size, max_tokens=wanted)

    def _evaluation(self) -> dict[str, np.ndarray]:
        """Held-out windows by domain."""
        text, out = self.config.text, {}
        for name in text.evaluation:
            corpus = find_corpus(name)
            part: Part = "heldout" if name in text.calibration else "all"
            tokens = tokenise(
                corpus.documents(part),
                self.source.tokenizer,
                vocab_size=self.source.config.vocab_size,
                max_tokens=text.evaluation_tokens,
            )
            out[corpus.name] = cut_windows(tokens, text.sequence_length, where=f"evaluation text {name}")
        return out

    def _batches_of(self, tokens: np.ndarray, where: str) -> list[Tensor]:
        windows = cut_windows(tokens, self.config.text.sequence_length, where=where)
        return list(torch.from_numpy(windows.astype(np.int64)).to(self.device).split(WINDOWS_PER_BATCH))

    # -----------------------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """All stages that are not done yet, then the rename."""
        report = self._report()
        stages = self.run / "stages"
        current = self.source
        for stage in self.config.stages:
            folder = stages / stage
            if stage in self.journal["done"]:
                continue
            if self.journal["done"] and current is self.source:
                current = _load(stages / self.journal["done"][-1], self.device)
            shutil.rmtree(folder, ignore_errors=True)  # finished but not journalled: done again
            self.events.say(f"stage {stage}")
            begun = time.monotonic()
            student, notes = self._stage(stage, current)
            measured = self.measurer.stage(student) | notes | {"name": stage, "seconds": time.monotonic() - begun}
            save(student, folder, dtype=self._dtype(), source=self.model, provenance=self._provenance(stage))
            report["stages"].append(measured)
            if stage == "lightning" and self.config.compare_start:
                report["presets"] = self._starts(current, measured)
            current = replace(current, model=student, config=student.config)
            report["seconds"] += time.monotonic() - begun
            write_json(self.run / "report.json", report)
            previous = self.journal["done"][-1:]
            self.journal["done"].append(stage)
            write_json(self.run / "journal.json", self.journal)
            for name in previous:
                shutil.rmtree(stages / name)
            self.events.say(self.measurer.line(measured))
        if not self.journal["done"]:
            raise Failure("no stage was run", where=self.run)
        (stages / self.journal["done"][-1]).rename(self.out)

    def _report(self) -> dict[str, Any]:
        """What was measured so far; a new run begins with the teacher."""
        path = self.run / "report.json"
        if path.exists():
            report: dict[str, Any] = json.loads(path.read_text())
            done = {"teacher", *self.journal["done"]}
            report["stages"] = [s for s in report["stages"] if s["name"] in done]
            return report
        c = self.source.config
        gqa = set(c.layer_kinds) == {"gqa"}
        group = (self._target(c).layer_group_size or 0) if gqa else 0
        report = {
            "title": f"{self.model.name} to {self.out.name}",
            "command": self.command,
            "date": now(),
            "commit": commit(),
            "environment": {"hardware": hardware(), **versions()},
            "seconds": 0.0,
            "settings": self.config.model_dump(mode="json"),
            "layout": {"group_size": group, "said": group_size_reason(c.num_hidden_layers, group)} if group else {},
            "plan": self._plan() if gqa else None,
            "texts": self._texts(),
            "stages": [self.measurer.stage(self.teacher.model) | {"name": "teacher"}],
        }
        write_json(path, report)
        return report

    def _plan(self) -> dict[str, Any]:
        layout = self.config.layout.model_dump(include={"group_size", "kv_lora_rank", "q_lora_rank"})
        return plan(load_config(str(self.model)), **layout).as_dict()

    def _texts(self) -> list[dict[str, Any]]:
        text, rows = self.config.text, []
        for role, names in (("calibration and warm-ups", text.calibration), ("evaluation", text.evaluation)):
            for name in names:
                corpus = find_corpus(name)
                rows.append({"name": corpus.name, "licence": corpus.licence, "source": corpus.source, "role": role})
        return rows

    def _stage(self, stage: Stage, current: Checkpoint) -> tuple[Ling, dict[str, Any]]:
        """The model after a stage, and what to note of it."""
        if stage == "lightning":
            return self._converted(stage, current, self._half(current.config))
        if stage == "mla":
            return self._converted(stage, current, self._full(current.config))
        warmup = self.config.linear_warmup if stage == "linear-warmup" else self.config.mla_warmup
        return self._warmed(stage, current, warmup)

    def _target(self, config: ModelConfig) -> ModelConfig:
        return target_config(config, **self.config.layout.model_dump())

    def _half(self, config: ModelConfig) -> ModelConfig:
        """Lightning everywhere but in the future MLA layers."""
        target = self._target(config)
        kinds = stage_kinds(config, target, "lightning")
        return target.replace(layer_kinds=kinds, mtp_layer_kind=config.mtp_layer_kind)

    def _full(self, config: ModelConfig) -> ModelConfig:
        """Every GQA layer becomes MLA; widths from the checkpoint's config where an earlier stage wrote them."""
        if "gqa" not in config.layer_kinds:
            raise UserError("there is no GQA layer left to convert", where="layer_kinds", value=sorted(set(config.layer_kinds)))
        kinds = tuple("mla" if kind == "gqa" else kind for kind in config.layer_kinds)
        plain = config.replace(layer_kinds=("gqa",) * config.num_hidden_layers, mtp_layer_kind="gqa")
        defaults = self._target(plain)
        widths = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        asked = self.config.layout.model_dump()
        chosen = {w: asked.get(w) or getattr(config, w) or getattr(defaults, w) for w in widths}
        return config.replace(layer_kinds=kinds, mtp_layer_kind="mla", **chosen)

    def _converted(self, stage: Stage, current: Checkpoint, config: ModelConfig) -> tuple[Ling, dict[str, Any]]:
        layers = len(current.model.model.layers)
        options = self.config.conversion
        shared: dict[str, Any] = {"on_layer": lambda i: self.events.layer(stage, i, layers), "bf16": self.bf16}
        found: list[Approximation]
        if stage == "lightning":
            student, found = to_lightning(current.model, config, self.calibration, options, seed=self.config.seed, **shared)
        else:
            student, found = to_mla(current.model, config, self.calibration, options, **shared)
        tokens = sum(w.numel() for w in self.calibration)
        return student, {"tokens": tokens, "approximations": [asdict(a) for a in found], "metrics": None}

    def _starts(self, teacher: Checkpoint, measured: dict[str, Any]) -> list[dict[str, Any]]:
        """Loss right after the Lightning conversion, by preset and domain: this run's, and the other preset's."""
        other = "paper" if self.config.preset == "best" else "best"
        self.events.say(f"  where preset {other} would start")
        config, options = self._half(teacher.config), preset(other).conversion
        ignore: dict[str, Any] = {"on_layer": lambda i: None, "bf16": self.bf16}
        student, _ = to_lightning(teacher.model, config, self.calibration, options, seed=self.config.seed, **ignore)
        rows = {self.config.preset: measured["domains"], other: self.measurer.domains(student)}
        return [
            {"preset": name, "stage": "lightning", "domain": domain, "loss": found["loss"], "gap": found["gap"]}
            for name, domains in rows.items()
            for domain, found in domains.items()
        ]

    def _warmed(self, stage: Stage, current: Checkpoint, warmup: Warmup) -> tuple[Ling, dict[str, Any]]:
        run = self.run / stage
        c = warmup.train
        batches = Batches(self.training, batch_size=c.batch_size, seed=c.seed)
        student = current.model
        result = train(
            student,
            c,
            batches,
            parameters=trainable(student.config, stage, warmup.trainable),
            run=run,
            teacher=self.teacher.model if c.kl else None,
            resume=(run / "train.json").exists(),
        )
        if result.stopped == "signal":
            raise Failure("stopped by a signal", where=stage, next="the same command with --resume")
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return student.eval(), {"tokens": result.tokens, "approximations": [], "metrics": f"{stage}/metrics.jsonl"}

    def _dtype(self) -> torch.dtype:
        return self.source.stored if self.config.dtype == "source" else getattr(torch, self.config.dtype)

    def _provenance(self, stage: Stage) -> dict[str, Any]:
        done = [*self.journal["done"], stage]
        return {
            "made by": "openling migrate",
            "preset": self.config.preset,
            "stages": ", ".join(done),
            "teacher": self.teacher.folder.name,
        }


def trainable(config: ModelConfig, stage: Stage, which: str) -> list[str]:
    """Names of the parameters a warm-up changes, as regular expressions.

    linear-warmup: W_qkv and the QK-norms of Lightning layers (as published); `best` adds gate, group norm, output projection.
    mla-warmup: all attention parameters of the MLA layers.
    """
    kind = "lightning" if stage == "linear-warmup" else "mla"
    layers = [i for i, k in enumerate(config.layer_kinds) if k == kind]
    if not layers:
        raise UserError(f"there is no {kind} layer to warm up", where="layer_kinds", value=sorted(set(config.layer_kinds)))
    names = r"(query_key_value|query_layernorm|key_layernorm)\..*"
    if which == "best":
        names = r"(query_key_value|query_layernorm|key_layernorm|g_proj|g_norm|dense)\..*"
    if kind == "mla":
        names = ".*"
    return [rf"model\.layers\.({'|'.join(map(str, layers))})\.attention\.{names}"]
