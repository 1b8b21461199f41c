"""Both conversions from folder to folder, for models of any size: one layer in memory, everything else moved as bytes.

The fits are `convert.py`'s, fed by layers from disk, so the result is that of the in-memory path to the bit. `OUT.run/` holds
`job.json` (settings, the source's shards), the units' claims and results (`weights/units.py`), residual streams, and `draft/`,
which becomes OUT by one rename. Units: `file-NAME` moves or makes a file of kept tensors, `layer-N` is a fitted layer,
`walk-STAGE` is all of a stage's. Whoever runs the same command with `--resume`, here or on another machine, takes part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openling.config.migrate import MigrateConfig
from openling.errors import Failure, UserError
from openling.migrate.calibrate import LayerStep, walk
from openling.migrate.convert import check_mla, fit_lightning, fit_mla
from openling.migrate.findings import Findings
from openling.migrate.journal import run_folder
from openling.migrate.layout import lightning_stage, mla_stage
from openling.migrate.memory import BUDGET, MOVERS, room
from openling.migrate.publish import LAYER_FILE, Draft
from openling.migrate.stack import DerivedStack, FolderStack
from openling.migrate.streams import DiskStreams, noise
from openling.model.config import LING_ARCHITECTURE, ModelConfig
from openling.model.ling import CallContext, Ling
from openling.ops.cpu import bf16_matmuls_pay, half_products, settle_bf16_matmuls
from openling.weights.files import (
    check_unchanged,
    copy_file,
    copy_tensors,
    file_hash,
    identity,
    link_file,
    read_ahead,
    write_shard,
)
from openling.weights.folder import EMBEDDINGS, LM_HEAD, Opened, check_tied, open_folder
from openling.weights.fp8 import Dequantised, Form, opened_values
from openling.weights.io import CheckpointReader, TensorFiles, check_outside, check_space, write_error
from openling.weights.linked import FilePlan, Mode, kept_tensors, plan_files
from openling.weights.names import Binding, bind
from openling.weights.units import Units, broken, locked, read_record
from openling.weights.whole import write_json

# Layers up to this size are asked for ahead; larger ones would push each other out of the system's cache.
AHEAD_BYTES = 1 << 30
WAIT_SECONDS = 0.5
CONFIG = "config.json"
BEGUN = {"settings": dict, "shards": dict, "bf16_products": bool}  # fields of job.json
IDENTITY = {"bytes", "changed_ns", "samples"}
Stage = Literal["lightning", "mla"]


@dataclass(frozen=True)
class Job:
    """What is asked. windows: calibration batches [B, T] of token ids; None fits on the weights alone (`weights_only`).

    memory: the budget in bytes; what a fit leaves of it lets experts be read fewer times.
    """

    source: Path
    out: Path
    config: MigrateConfig
    mode: Mode
    windows: list[Tensor] | None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory: int = BUDGET

    def settings(self) -> dict[str, Any]:
        """What must not change between the parts of a run."""
        if self.windows is None:  # the noise that stands for text
            text: Any = self.config.text.model_dump(include={"sequence_length", "calibration_tokens"})
        else:
            text = hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for w in self.windows)).hexdigest()
        chosen = self.config.model_dump(mode="json", include={"stages", "layout", "conversion", "seed"})
        return chosen | {"mode": self.mode, "text": text, CONFIG: file_hash(self.source / CONFIG)}


@dataclass(frozen=True)
class Step:
    """One conversion of the job: the folder before it (as opened), the configuration after it."""

    stage: Stage
    before: ModelConfig
    after: ModelConfig

    @property
    def layers(self) -> list[int]:
        """Layers whose mixer changes."""
        count = self.before.num_hidden_layers + self.before.num_nextn_predict_layers
        return [i for i in range(count) if self.before.layer_kind(i) != self.after.layer_kind(i)]


@dataclass(frozen=True)
class Outline:
    """All that the headers and the configuration say about a job."""

    opened: Opened
    raw: CheckpointReader
    steps: list[Step]
    files: list[FilePlan]
    new: dict[str, torch.Size]  # our names, of fitted tensors

    @property
    def target(self) -> ModelConfig:
        """The configuration of the result."""
        return self.steps[-1].after

    @property
    def layers(self) -> list[int]:
        """Every layer that is fitted."""
        return sorted(i for step in self.steps for i in step.layers)

    def attention_bytes(self) -> int:
        """Stored bytes of the source's mixers that are replaced."""
        prefixes = tuple(f"model.layers.{i}.attention." for i in self.layers)
        names = [n for b in self.opened.bindings.values() if b.ours.startswith(prefixes) for n in b.theirs]
        return sum(self.raw.nbytes(name) for name in names)

    def new_bytes(self) -> int:
        """Bytes of the fitted layers' files, but for headers and FP8 scales."""
        width = 1 if isinstance(self.opened.reader, Dequantised) else self.opened.stored.itemsize
        return sum(shape.numel() for shape in self.new.values()) * width


def outline(source: Path, config: MigrateConfig, mode: Mode) -> Outline:
    """Check the source and plan the result, reading nothing but headers."""
    opened = open_folder(source)
    raw = CheckpointReader(opened.folder)
    layout = config.layout.model_dump()
    steps, before = [], opened.config
    for stage in config.stages:
        if stage in ("lightning", "mla"):
            after = lightning_stage(before, layout) if stage == "lightning" else mla_stage(before, layout)
            if stage == "mla":
                check_mla(config.conversion, after)
            steps.append(Step("lightning" if stage == "lightning" else "mla", before, after))
            before = after
    with torch.device("meta"):
        model = Ling(before.replace(tie_word_embeddings=False))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    fitted = tuple(f"model.layers.{i}.attention." for step in steps for i in step.layers)
    new = {name: shape for name, shape in shapes.items() if name.startswith(fitted)}
    old = dict(opened.bindings)
    old.setdefault(LM_HEAD, old[EMBEDDINGS])  # engines cannot tie this family
    kept_names = [name for name in shapes if name not in new]
    bindings = bind(LING_ARCHITECTURE, model.config, kept_names, present=raw)
    files = plan_files(raw, kept_tensors(old, bindings, opened.reader), mode)
    return Outline(opened, raw, steps, files, new)


def check_walk(config: MigrateConfig) -> None:
    """Raise a UserError for what needs more than one walk through the layers."""
    if config.conversion.kv_rank_budget and "mla" in config.stages:
        what = "ranks are shared out once all layers have been seen, which this one walk has not when it fits the first"
        raise UserError(what, where="--conversion.kv_rank_budget", expected="null", next="openling migrate, which walks twice")


def check_place(source: Path, out: Path, *, resume: bool) -> None:
    """Raise a UserError where a conversion of `source` to `out` may neither begin nor, as was asked, go on."""
    out = out.absolute()
    run = run_folder(out)
    finished = resume and (run / "report.json").exists() and not (run / "draft").exists()
    if os.path.lexists(out) and not finished:
        raise UserError("the output exists already", where=out, expected="a new folder", next="choose another, or remove it")
    check_outside(out, source)
    held = {path.name: path for path in run.iterdir()} if run.exists() else {}
    if "job.json" in held:
        if not resume:
            raise _begun_before(run)
        read_record(run / "job.json", run, BEGUN)
    elif resume and not run.exists():
        raise UserError("there is nothing to resume", where=run, expected="job.json of an earlier run", next="omit --resume")
    # One that was killed before it had job.json had nothing yet: it begins, with --resume or without.
    elif any(not (name.startswith(".") or (name == "draft" and not any(held[name].iterdir()))) for name in held):
        raise UserError("the run folder holds something else", where=run, next="choose another OUT, or remove it")


def _begun_before(run: Path) -> UserError:
    return UserError("a conversion to this folder was begun", where=run, next="add --resume, or remove that folder")


def convert_folder(job: Job, *, resume: bool, say: Any = lambda text: None) -> dict[str, Any]:
    """Convert `job.source` into the new folder `job.out`; what it took, as a dict (also in `OUT.run/report.json`)."""
    check_walk(job.config)
    check_place(job.source, job.out, resume=resume)
    out = job.out.absolute()
    run = run_folder(out)
    if os.path.lexists(out):
        return _finished(job, run)
    plan = outline(job.source, job.config, job.mode)
    check_tied(plan.opened)
    try:
        shards = _join(job, plan, run, resume=resume)
        return _Conversion(job, plan, run, shards, say).go()
    except OSError as error:
        raise write_error(error, out, kept="what is done is kept", resume="free some space, then --resume") from error


def _join(job: Job, plan: Outline, run: Path, *, resume: bool) -> dict[str, dict[str, object]]:
    """Begin a run folder, or check that it is this job's; the identities of the source's shards."""
    path = run / "job.json"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        _check_space(plan, run)
        _check_links(plan, run)
        shards = {shard: identity(plan.raw.folder / shard) for shard in plan.raw.shards}
        (run / "draft").mkdir(exist_ok=True)
        about = {"settings": job.settings(), "shards": shards, "bf16_products": bf16_matmuls_pay()}
        with locked(run / ".job.lock"):  # of several that begin at once, one does; the others find its job.json
            if begins := not path.exists():
                write_json(path, about)
        if begins:
            return shards
    if not resume:
        raise _begun_before(run)
    found = _begun(job, run)
    if found.keys() != set(plan.raw.shards) or not all(isinstance(v, dict) and v.keys() >= IDENTITY for v in found.values()):
        raise broken(path, run, f"it is about other shards than those of {plan.raw.folder}")
    for shard, before in found.items():
        check_unchanged(plan.raw.folder / shard, before, thorough=True)
    return found


def _begun(job: Job, run: Path) -> dict[str, dict[str, object]]:
    """The source's shards when this run began; a `UserError` where it was begun with other settings."""
    begun = read_record(run / "job.json", run, BEGUN)
    for name, value in job.settings().items():
        if begun["settings"].get(name) != value:
            raise UserError(
                "the settings have changed since this run began",
                where=job.source / name if name == CONFIG else name,
                value=value,
                expected=begun["settings"].get(name),
                next=f"undo that, or remove {run}",
            )
    settle_bf16_matmuls(begun["bf16_products"])
    found: dict[str, dict[str, object]] = begun["shards"]
    return found


def _finished(job: Job, run: Path) -> dict[str, Any]:
    """The report of a run that has published its output, by whichever process."""
    _begun(job, run)
    shutil.rmtree(run / "streams", ignore_errors=True)
    return read_record(run / "report.json", run, {})


def _check_space(plan: Outline, run: Path) -> None:
    needed = sum(f.bytes for f in plan.files if f.action != "link") + plan.new_bytes() + (16 << 20)
    fix = "free some space, name a folder on another disk, or use --link on this one"
    check_space(run, needed, "no space left for the result", fix)


def _check_links(plan: Outline, run: Path) -> None:
    """Raise a UserError where a shard cannot be linked, before anything is fitted; whether it can is a matter of each file."""
    probe = run / f".link.{os.uname().nodename}.{os.getpid()}"
    try:
        for file in plan.files:
            if file.action == "link" and file.source:
                link_file(plan.raw.folder / file.source, probe)
    finally:
        probe.unlink(missing_ok=True)


class _Conversion:
    """One process's part in a job."""

    def __init__(self, job: Job, plan: Outline, run: Path, shards: dict[str, dict[str, object]], say: Any) -> None:
        self.job, self.plan, self.run, self.shards, self.say = job, plan, run, shards, say
        self.units, self.draft = Units(run), Draft(job, plan, run, shards)

    def go(self) -> dict[str, Any]:
        """Do what nobody else does, wait for the rest, publish."""
        begun = time.monotonic()
        with self.units.claim("publish") as mine:
            if mine and not self._published():
                self._recheck(thorough=True)
        with ThreadPoolExecutor(MOVERS) as pool:
            moves = [pool.submit(self._move, file) for file in self.plan.files]
            try:
                self._fit_all()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            for move in moves:
                move.result()
        while not self._publish(begun):
            time.sleep(WAIT_SECONDS)
            for file in self.plan.files:  # whose process died
                self._move(file)
            self._fit_all()
        report: dict[str, Any] = json.loads((self.run / "report.json").read_text())
        return report

    def _move(self, file: FilePlan) -> None:
        unit, folder, out = f"file-{file.name}", self.plan.raw.folder, self.draft.folder / file.name
        with self.units.claim(unit) as mine:
            if not mine:
                return
            sources = [file.source] if file.source else sorted({self.plan.raw.spans[t.pieces[0]].shard for t in file.tensors})
            for shard in sources:
                check_unchanged(folder / shard, self.shards[shard], thorough=False)
            if file.source is None:
                done = copy_tensors(self.plan.raw, list(file.tensors), out)
            else:
                done = (link_file if file.action == "link" else copy_file)(folder / file.source, out)
            for shard in sources:
                check_unchanged(folder / shard, self.shards[shard], thorough=False)
            self.units.record(unit, asdict(done))

    # -----------------------------------------------------------------------------------------------------------------

    def _fit_all(self) -> None:
        for number, step in enumerate(self.plan.steps):
            if self.job.windows is None:
                self._fit_alone(step)
                continue
            while self.units.result(f"walk-{step.stage}") is None:
                with self.units.claim(f"walk-{step.stage}") as mine:
                    if mine:
                        self._fit_along(step, self._opened_before(number))
                        self.units.record(f"walk-{step.stage}", {"layers": step.layers})
                        shutil.rmtree(self.run / "streams" / step.stage, ignore_errors=True)
                        continue
                time.sleep(WAIT_SECONDS)

    def _opened_before(self, number: int) -> Opened:
        """The model in front of a step: the source, and the layers that earlier steps made of it."""
        opened, done = self.plan.opened, [i for step in self.plan.steps[:number] for i in step.layers]
        if not done:
            return opened
        made = TensorFiles.of(self.draft.folder, [LAYER_FILE.format(i) for i in done])
        spans = {n: replace(s, shard=str((self.draft.folder / s.shard).absolute())) for n, s in made.spans.items()}
        raw = TensorFiles(opened.folder, self.plan.raw.spans | spans)
        config = self.plan.steps[number].before
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in Ling(config).state_dict().items()}
        new = tuple(f"model.layers.{i}.attention." for i in done)
        bindings = dict(opened.bindings) | {name: Binding(name, (name,)) for name in shapes if name.startswith(new)}
        reader = opened_values(raw, opened.hf_config)
        return replace(opened, config=config, reader=reader, bindings=bindings, shapes=shapes)

    def _fit_along(self, step: Step, opened: Opened) -> None:
        """Fit with calibration text, every layer on what the student makes of it so far."""
        assert self.job.windows is not None
        device, tokens = self.job.device, max(w.numel() for w in self.job.windows)
        source = FolderStack(opened, device, room=room(self.plan, tokens, self.job.memory))
        streams = DiskStreams(self.run / "streams" / step.stage, device, self._check_shards)
        for at in walk(source, DerivedStack(source, step.after), self.job.windows, streams=streams, bf16=half_products(device)):
            self._ahead(opened, at.index + 1)
            if at.index in step.layers:
                self._write(at, self._fit(at, step))
            self.say(f"{step.stage}: layer {at.index}")

    def _fit_alone(self, step: Step) -> None:
        """Fit every layer by itself, from its weights and normal inputs: whoever comes takes any layer."""
        opened = replace(self.plan.opened, config=step.before)
        source = FolderStack(opened, self.job.device, mixers_only=True)
        student = DerivedStack(source, step.after)
        text, width = self.job.config.text, step.before.hidden_size
        batches, tokens = max(2, text.calibration_tokens // text.sequence_length), text.sequence_length
        ids = torch.zeros(1, tokens, dtype=torch.long, device=self.job.device)
        calls = [CallContext(s.rope(ids), None, None) for s in (source, student)]
        for i in step.layers:
            with self.units.claim(f"layer-{i}") as mine, torch.no_grad():
                if mine:
                    h = noise(width, i, batches=batches, tokens=tokens, seed=self.job.config.seed, device=self.job.device)
                    at = LayerStep(i, source.layer(i), student.layer(i), h, h, calls[0], calls[1])
                    self._write(at, self._fit(at, step))
                    self.say(f"{step.stage}: layer {i}")

    def _fit(self, at: LayerStep, step: Step) -> Findings:
        options, seed, text = self.job.config.conversion, self.job.config.seed, self.job.windows is not None
        if not text:  # normal inputs say nothing about distances, or about what a mixer should output
            fold = 1 if options.rope_fold == "auto" else options.rope_fold
            off = dict.fromkeys(("match_heads", "refit_norm", "refit_gate", "refit_output", "attention_weighted"), False)
            options = options.model_copy(update={"rope_fold": fold, **off})
        if step.stage == "lightning":
            return fit_lightning(at, options, seed, text=text)
        return fit_mla(at, options, step.before.rotary_dim)

    def _write(self, at: LayerStep, found: Findings) -> None:
        tensors = dict(self._stored(at))
        for name, tensor in at.student.attention.state_dict().items():
            if not tensor.isfinite().all():
                raise Failure("a fitted mixer holds NaN or infinite values", where=f"layer {at.index}, {name}")
        self._check_shards()
        done = write_shard(self.draft.folder / LAYER_FILE.format(at.index), tensors)
        self.units.record(f"layer-{at.index}", asdict(done) | found.as_dict())

    def _check_shards(self) -> None:
        """A Failure where a shard is no longer what it was: what has just been read of it is not kept."""
        for shard, before in self.shards.items():
            check_unchanged(self.plan.raw.folder / shard, before, thorough=False)

    def _stored(self, at: LayerStep) -> Iterator[tuple[str, Tensor]]:
        """The fitted mixer as its file holds it: in the folder's dtype, or quantised as the source's mixer was."""
        form, dtype = self._form(at.index), self.plan.opened.stored
        if isinstance(self.plan.opened.reader, Dequantised):
            dtype = self.plan.raw.dtype(f"model.layers.{at.index}.input_layernorm.weight")
        for name, tensor in at.student.attention.state_dict().items():
            full = f"model.layers.{at.index}.attention.{name}"
            if form is None or tensor.dim() != 2:
                yield full, tensor.to(dtype)
                continue
            values, scale = form.quantise(tensor)
            yield from ((full, values), (full + form.suffix, scale))

    def _form(self, layer: int) -> Form | None:
        reader = self.plan.opened.reader
        piece = self.plan.opened.bindings[f"model.layers.{layer}.attention.query_key_value.weight"].theirs[0]
        return reader.forms.get(piece) if isinstance(reader, Dequantised) else None

    def _ahead(self, opened: Opened, layer: int) -> None:
        prefix = f"model.layers.{layer}."
        names = [n for b in opened.bindings.values() if b.ours.startswith(prefix) for n in b.theirs]
        if sum(opened.reader.nbytes(name) for name in names) <= AHEAD_BYTES:
            read_ahead(opened.reader, names)

    # -----------------------------------------------------------------------------------------------------------------

    def _published(self) -> bool:
        """Whether the draft has become the output, by a process that was killed before it could record that."""
        return os.path.lexists(self.job.out) and not self.draft.folder.exists()

    def _recheck(self, *, thorough: bool) -> bool:
        """Whether all files are as the units left them; where they are not, they are made again."""
        wrong = self.draft.recheck(self.units, thorough=thorough)
        if wrong:
            self.say(f"not as it was left, made again: {', '.join(wrong)}")
        return not wrong

    def _publish(self, begun: float) -> bool:
        """Make the draft the output, once every unit is done; True where it is, by whomever."""
        with self.units.claim("publish") as mine:
            done = {unit: result for unit in self.draft.made() if (result := self.units.result(unit)) is not None}
            if mine and self._published():
                self.units.record("publish", {})
            elif mine and self._recheck(thorough=False) and len(done) == len(self.draft.made()):
                for shard, before in self.shards.items():
                    check_unchanged(self.plan.raw.folder / shard, before, thorough=True)
                self.draft.finish(done, begun)
                self.units.record("publish", {})
                shutil.rmtree(self.run / "streams", ignore_errors=True)
        return self.units.result("publish") is not None
