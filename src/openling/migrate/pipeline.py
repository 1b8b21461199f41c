"""A migration from folder to folder: stages in order, each a complete checkpoint, a journal between them.

`OUT.run/` holds the run: `journal.json` (what is done), `report.json` (what was measured), `stages/NAME` (the last finished
stage's checkpoint), `NAME/` (a warm-up's training run). The finished checkpoint becomes `OUT` by one rename. A run that is
killed anywhere resumes with its last finished stage, inside a warm-up with its last training checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openling.config.migrate import MigrateConfig, Stage, Warmup, preset
from openling.data.pack import Batches, cut_windows
from openling.environment import commit, hardware, now, versions
from openling.errors import Failure, UserError
from openling.migrate.convert import to_lightning, to_mla
from openling.migrate.findings import Findings
from openling.migrate.gates import Gatekeeper
from openling.migrate.journal import continued, is_finished, run_folder, sweep
from openling.migrate.layout import layout_reason
from openling.migrate.measurer import Measurer
from openling.migrate.plan import load_config, plan
from openling.migrate.request import Request, check_begun, check_place, config_of
from openling.migrate.select import select_layers
from openling.migrate.texts import evaluation_windows, origins, training_tokens
from openling.migrate.touched import converted, round_to, stored_bytes, trainable, values
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.ops.cpu import bf16_matmuls_pay, half_products, settle_bf16_matmuls
from openling.train.checkpoint import sole_writer, write_json
from openling.train.loop import train
from openling.train.optim import select_parameters
from openling.train.while_training import own_memory
from openling.weights.export import save
from openling.weights.files import MANIFEST, fingerprint, manifest
from openling.weights.folder import load
from openling.weights.io import CheckpointReader, check_space

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

    `teacher` is the model to agree with, by default `model` itself when it is all GQA. `model` is only ever read. A request
    that cannot be carried out is refused before any weight is read, and leaves no run folder behind.
    """
    model, out, events = model.absolute(), out.absolute(), events or Events()
    if resume and os.path.lexists(out) and is_finished(out, model, config):
        sweep(run_folder(out))
        events.say("this run is finished")
        return run_folder(out)
    check_place(model, out, teacher)
    run = run_folder(out)
    is_new = not run.exists()
    if resume and is_new:
        check_begun(run, resume=resume)  # before the run folder is made
    with sole_writer(run):
        check_begun(run, resume=resume)
        try:
            migration = _Migration(model, out, config, teacher, device, command, events)
        except BaseException:
            if is_new:
                shutil.rmtree(run)
            raise
        migration.go()
    return run


NO_TEACHER = "no softmax-attention teacher was named"


class _Migration(Request):
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
    ) -> None:
        """Checks and texts first, then weights; the journal is there from the moment on from which a run can resume."""
        super().__init__(model, out, config, teacher)
        self.device, self.command, self.events, found = torch.device(device), command, events, self.found
        self._check_space()
        text = config.text
        self.tokens = training_tokens(text, self.tokenizer, vocab_size=found.vocab_size, max_tokens=self._most_tokens())
        calibration = cut_windows(self.tokens[: text.calibration_tokens], text.sequence_length, where="calibration text")
        self.calibration = list(torch.from_numpy(calibration.astype(np.int64)).to(self.device).split(WINDOWS_PER_BATCH))
        for name, warmup in (("linear_warmup", config.linear_warmup), ("mla_warmup", config.mla_warmup)):
            cut_windows(self.tokens, warmup.train.sequence_length, where=f"training text of {name}")
        evaluation = evaluation_windows(text, self.tokenizer, vocab_size=found.vocab_size)
        fingerprints = self._fingerprints(evaluation)
        self.journal: dict[str, Any] = {"model": str(model), **fingerprints, "config": config.model_dump(mode="json"), "done": []}
        self.journal |= {"bf16_products": bf16_matmuls_pay(), "gates": {}}
        if (self.run / "journal.json").exists():
            self.journal = continued(self.run, self.journal, config)
            settle_bf16_matmuls(self.journal["bf16_products"])
        self.bf16 = half_products(self.device)
        self.source = _load(model, self.device)
        self.teacher = self.source if teacher is None else _load(teacher, self.device)
        write_json(self.run / "journal.json", self.journal)
        self.measurer = Measurer(self.teacher.model, self.tokenizer, evaluation, recall=config.recall, bf16=self.bf16)
        self.gates = Gatekeeper(config, self.run, self.journal, vocabulary=found.vocab_size)

    def _check_space(self) -> None:
        """Room for two stages and a training checkpoint: about three times the model in FP32, what is there already included."""
        reader = CheckpointReader(self.model)
        needed = 3 * 4 * sum(math.prod(reader.shape(name)) for name in reader.names()) + (16 << 20)
        needed -= sum(path.stat().st_size for path in self.run.rglob("*") if path.is_file())
        check_space(self.run, needed, "no space left for the run")

    def _fingerprints(self, evaluation: dict[str, np.ndarray]) -> dict[str, str]:
        """What must not change between the parts of a run: source, teacher, texts."""
        texts = hashlib.sha256(self.tokens.tobytes())
        for name, windows in evaluation.items():
            texts.update(name.encode() + windows.tobytes())
        source = fingerprint(self.model)
        teacher = source if self.teacher_folder == self.model else fingerprint(self.teacher_folder)
        return {"source model": source, "teacher": teacher, "texts": texts.hexdigest()}

    def _most_tokens(self) -> int:
        """As many as calibration or the longer warm-up reads."""
        runs = [w.train for w in (self.config.linear_warmup, self.config.mla_warmup)]
        warm = [c.tokens or c.total_steps * c.batch_size * c.sequence_length for c in runs]
        return max(self.config.text.calibration_tokens, *warm)

    # -----------------------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """All stages that are not done yet, each through its gates, then the rename."""
        report = self._report()
        for measured in report["stages"]:
            self.gates.check(measured["name"], report, self.events.say)
        current = self.source
        read: Path | None = self.source.folder
        for stage in self.config.stages:
            if stage in self.journal["done"]:
                continue
            if self.journal["done"] and current is self.source:
                current = _load(self.run / "stages" / self.journal["done"][-1], self.device)
                read = current.folder
            current = self._finish(stage, current, report, stored_bytes(read) if read else 0)
            read = None  # the next stage finds its model in memory
            self.gates.check(stage, report, self.events.say)
        self._publish(self.run / "stages" / self.journal["done"][-1])

    def _finish(self, stage: Stage, current: Checkpoint, report: dict[str, Any], read: int) -> Checkpoint:
        """Carry out a stage, measure and write it, and note that it is done; `read`: bytes of weights read for it."""
        stages = self.run / "stages"
        folder = stages / stage
        shutil.rmtree(folder, ignore_errors=True)  # finished but not journalled: done again
        self.events.say(f"stage {stage}")
        begun = time.monotonic()
        try:
            student, notes = self._stage(stage, current)
        except torch.linalg.LinAlgError as error:
            why = str(error).splitlines()[0]
            raise Failure("the algebra of this stage has no solution", where=f"stage {stage}", value=why) from error
        round_to(student, self._dtype())
        worked = time.monotonic()
        measured = self.measurer.stage(student) | notes | {"name": stage}
        known = time.monotonic()
        save(
            student,
            folder,
            dtype=self._dtype(),
            source=self.model,
            provenance=self._provenance(stage, measured),
            name=self.out.name,
        )
        written, ended = stored_bytes(folder), time.monotonic()
        measured["bytes"] = {"read": read, "written": written, "changed": measured.pop("changed") * self._dtype().itemsize}
        measured["spent"] = {"work": worked - begun, "measure": known - worked, "write": ended - known}
        measured["seconds"] = ended - begun
        report["stages"].append(measured)
        if stage == "lightning" and self.config.compare_start:
            report["presets"] = self._starts(current, measured)
            losses = [f"{row['domain']} {row['loss']:.3f}" for row in report["presets"] if row["preset"] != self.config.preset]
            self.events.say(f"  it would start at {'; '.join(losses)} nats")
        report["seconds"] += time.monotonic() - begun
        write_json(self.run / "report.json", report)
        previous = self.journal["done"][-1:]
        self.journal["done"].append(stage)
        write_json(self.run / "journal.json", self.journal)
        for leftover in (*(stages / name for name in previous), self.run / stage / "checkpoints"):
            shutil.rmtree(leftover, ignore_errors=True)
        self.events.say(self.measurer.line(measured))
        return replace(current, model=student, config=student.config)

    def _publish(self, last: Path) -> None:
        """Make the last stage's checkpoint the output."""
        if not last.exists():
            raise UserError("this run was finished, and its result moved away", where=self.out, next=f"remove {self.run}")
        if os.path.lexists(self.out):
            raise UserError("the output has appeared meanwhile", where=self.out, next="move it away, then add --resume")
        trained = {"trained": self._trained(config_of(last))}
        write_json(last / MANIFEST, manifest(last, CheckpointReader(self.model)) | trained)
        last.rename(self.out)
        sweep(self.run)

    def _trained(self, config: ModelConfig) -> list[str]:
        """Names of the parameters that this run's warm-ups trained, as regular expressions."""
        warmups = [(stage, self._warmup(stage)) for stage in self.config.stages if stage.endswith("warmup")]
        return [name for stage, w in warmups for name in trainable(config, stage, w.trainable, mtp=w.train.mtp > 0)]

    def _report(self) -> dict[str, Any]:
        """What was measured so far; a new run begins with the teacher."""
        path = self.run / "report.json"
        if path.exists():
            report: dict[str, Any] = json.loads(path.read_text())
            done = {"teacher", "source", *self.journal["done"]}
            report["stages"] = [s for s in report["stages"] if s["name"] in done]
            return report
        c = self.source.config
        gqa = set(c.layer_kinds) == {"gqa"}
        group = self._target(c).layer_group_size if gqa else None
        said = layout_reason(c.num_hidden_layers, self.layout.mla_layers, self.layout.group_size) if gqa else ""
        if not self.has_teacher:
            said = f"{NO_TEACHER}: all gaps are to MODEL as it was given, converted in part already (--teacher FOLDER)"
        if said:
            self.events.say(said)
        report = {
            "title": f"{self.model.name} to {self.out.name}",
            "command": self.command,
            "date": now(),
            "commit": commit(),
            "environment": {"hardware": hardware(), **versions()},
            "seconds": 0.0,
            "settings": self.config.model_dump(mode="json"),
            "layout": {"group_size": group, "said": said},
            "plan": self._plan() if gqa else None,
            "texts": origins(self.config.text),
            "stages": [self.measurer.stage(self.teacher.model) | {"name": "teacher"}],
        }
        if self.source is not self.teacher:  # what the first stage starts from
            report["stages"].append(self.measurer.stage(self.source.model) | {"name": "source"})
        write_json(path, report)
        return report

    def _plan(self) -> dict[str, Any]:
        return plan(load_config(str(self.model)), **self.layout.model_dump(exclude={"decay_offset"})).as_dict()

    def _stage(self, stage: Stage, current: Checkpoint) -> tuple[Ling, dict[str, Any]]:
        """The model after a stage, and what to note of it."""
        if stage == "lightning":
            scores = self._select(current) if self.layout.mla_layers == "selected" else None
            return self._converted(stage, current, self._half(current.config), scores)
        if stage == "mla":
            if "lightning" not in current.config.layer_kinds:
                self.events.say("  no layer is Lightning: all become MLA; for the hybrid, stage lightning comes first")
            return self._converted(stage, current, self._full(current.config))
        return self._warmed(stage, current, self._warmup(stage))

    def _select(self, current: Checkpoint) -> Findings:
        """Choose the MLA layers; every layer's score, as the report has it."""
        options, count = self.config.conversion, current.config.num_hidden_layers
        chosen = select_layers(
            current.model,
            self._target(current.config),
            self.calibration,
            options,
            seed=self.config.seed,
            bf16=self.bf16,
            on_layer=lambda i: self.events.layer("selection", i, count),
        )
        self.layout = self.layout.model_copy(update={"mla_layers": chosen.layers})
        self.events.say(f"  MLA in layers {', '.join(map(str, chosen.layers))}")
        return chosen.findings(options.layer_score)

    def _converted(
        self, stage: Stage, current: Checkpoint, config: ModelConfig, before: Findings | None = None
    ) -> tuple[Ling, dict[str, Any]]:
        """The student of a conversion; `before`: what was found out to prepare it."""
        layers = len(current.model.model.layers)
        options = self.config.conversion
        shared: dict[str, Any] = {"on_layer": lambda i: self.events.layer(stage, i, layers), "bf16": self.bf16}
        if stage == "lightning":
            student, found = to_lightning(current.model, config, self.calibration, options, seed=self.config.seed, **shared)
        else:
            student, found = to_mla(current.model, config, self.calibration, options, **shared)
        tokens = sum(w.numel() for w in self.calibration)
        changed = values(student, converted(current.config, config))
        everything = before or Findings()
        everything.add(found)
        return student, {"tokens": tokens, **everything.as_dict(), "changed": changed, "metrics": None}

    def _starts(self, teacher: Checkpoint, measured: dict[str, Any]) -> list[dict[str, Any]]:
        """Loss right after the Lightning conversion, by preset and domain: this run's, and the other preset's."""
        other = "paper" if self.config.preset == "best" else "best"
        self.events.say(f"  where preset {other} would start")
        config, options = self._half(teacher.config), preset(other).conversion
        ignore: dict[str, Any] = {"on_layer": lambda i: None, "bf16": self.bf16}
        fitted = (options.match_heads, options.refit_norm, options.refit_gate, options.refit_output)
        blind = not any(fitted)  # nothing is fitted: one batch does for the walk
        windows = self.calibration[:1] if blind else self.calibration
        student, _ = to_lightning(teacher.model, config, windows, options, seed=self.config.seed, **ignore)
        rows = {self.config.preset: measured["domains"], other: self.measurer.domains(student)}
        return [
            {"preset": name, "stage": "lightning", "domain": domain, "loss": found["loss"], "gap": found["gap"]}
            for name, domains in rows.items()
            for domain, found in domains.items()
        ]

    def _warmed(self, stage: Stage, current: Checkpoint, warmup: Warmup) -> tuple[Ling, dict[str, Any]]:
        run = self.run / stage
        c = warmup.train
        windows = cut_windows(self.tokens, c.sequence_length, where="training text")
        batches = Batches(windows, batch_size=c.batch_size, seed=c.seed)
        student, names = current.model, trainable(current.config, stage, warmup.trainable, mtp=c.mtp > 0)
        # Also where this warm-up follows no teacher: measurements and later stages do.
        own_memory(self.teacher.model, select_parameters(student, names))
        result = train(
            student,
            c,
            batches,
            parameters=names,
            run=run,
            teacher=self.teacher.model if c.follows else None,
            resume=(run / "train.json").exists(),
        )
        if result.stopped == "signal":
            failure = Failure("stopped by a signal", where=stage, next="the same command with --resume")
            failure.exit_code = 128 + (result.signal or 0)  # as a shell reports a process that died of it
            raise failure
        notes = []
        if result.stopped == "time":
            notes.append(f"stopped by the clock ({c.max_seconds:.0f} s) after {result.steps} of {c.total_steps} steps")
            self.events.say(f"  {notes[0]}")
        about = {"tokens": result.tokens, "changed": values(student, names), "metrics": f"{stage}/metrics.jsonl", "notes": notes}
        return student.eval(), about

    def _dtype(self) -> torch.dtype:
        return self.source.stored if self.config.dtype == "source" else getattr(torch, self.config.dtype)

    def _provenance(self, stage: Stage, measured: dict[str, Any]) -> dict[str, Any]:
        done = [*self.journal["done"], stage]
        losses = {
            f"loss on {domain}": f"{found['loss']:.3f} nats per token (teacher {found['teacher_loss']:.3f})"
            for domain, found in measured["domains"].items()
        }
        return losses | {
            "made by": "openling migrate",
            "preset": self.config.preset,
            "stages": ", ".join(done),
            "teacher": self.teacher.folder.name,
        }
