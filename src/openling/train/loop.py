"""The training loop: FP32 master weights, BF16 autocast, cross-entropy and KL to a teacher, exact resume.

A run folder holds `train.json`, `metrics.jsonl` and `checkpoints/`. A run that was stopped and resumed ends with the same
bits as one that was not, on the same machine: on a CPU always, on CUDA under `torch.use_deterministic_algorithms(True)`
(without it two uninterrupted runs differ as well).
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openling.config.train import FREE_ON_RESUME, TrainConfig
from openling.data.pack import Batches
from openling.errors import Failure, UserError
from openling.model.ling import Ling
from openling.ops.cpu import bf16_matmuls_pay, settle_bf16_matmuls
from openling.ops.loss import HeadLoss, head_loss
from openling.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, sole_writer, write_json
from openling.train.metrics import Display, MetricsLog, memory_bytes
from openling.train.optim import ParameterChoice, adamw, learning_rate, select_parameters


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands. `stopped`: all steps done, time box reached, or SIGINT or SIGTERM came (`signal` says which)."""

    steps: int
    tokens: int
    seconds: float
    stopped: Literal["finished", "time", "signal"]
    signal: int | None
    metrics: dict[str, Any]


def train(
    model: Ling,
    config: TrainConfig,
    batches: Batches,
    *,
    parameters: ParameterChoice,
    run: Path,
    teacher: Ling | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train the chosen parameters of `model` in place on `batches` ([batch_size, sequence_length] token ids each).

    parameters: regular expressions for names, or a function of the name; all others are frozen and get no gradient.
    teacher: needed when `config.kl` > 0. run: the folder for metrics and checkpoints. resume: continue it; when it holds no
    run that is a `UserError`, and so is a run of another configuration. A loss or gradient that is not finite is a `Failure`
    that names the step, before any weight changes; `failure.json` keeps the batch.
    """
    expected = [config.batch_size, config.sequence_length]
    if (found := [batches.batch_size, batches.windows.shape[1]]) != expected:
        raise UserError("the batches are not of the configured shape", value=found, expected=expected)
    if config.kl and teacher is None:
        raise UserError("a KL loss needs a teacher", where="kl", value=config.kl, expected="a teacher, or kl = 0")
    models = [model, teacher] if teacher is not None and config.kl else [model]
    with sole_writer(run), _only_gradients_of(model, select_parameters(model, parameters)) as chosen:
        _enter_run(run, config, list(chosen), resume)
        with _cast_once(models, set(chosen.values()), config):
            return _Run(model, config, batches, chosen, teacher, run, silent=not progress).go()


def _enter_run(run: Path, config: TrainConfig, names: list[str], resume: bool) -> None:
    """Write `train.json` in a new run; in one that resumes, compare with it."""
    path = run / "train.json"
    fields = config.model_dump(mode="json")
    if resume and not path.exists():
        raise UserError(
            "there is nothing to resume", where=run, expected="train.json of an earlier run", next="run without --resume"
        )
    if not resume and path.exists():
        raise UserError(
            "the folder holds a run already", where=run, expected="a new folder", next="add --resume, or choose another"
        )
    if not resume:
        return write_json(path, {"config": fields, "parameters": names})
    old = json.loads(path.read_text())
    for field, value in fields.items():
        if field not in FREE_ON_RESUME and old["config"].get(field) != value:
            raise UserError("the run has another configuration", where=field, value=value, expected=old["config"].get(field))
    if different := sorted(set(old["parameters"]) ^ set(names)):
        raise UserError("the run trains other parameters", where=different[0], expected=f"{len(old['parameters'])} as in {path}")
    return None


@contextmanager
def _only_gradients_of(model: nn.Module, chosen: dict[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Freeze all other parameters, so that backward ends below the lowest chosen one; undone afterwards."""
    before = {p: p.requires_grad for p in model.parameters()}
    wanted = set(chosen.values())
    try:
        for p in before:
            p.requires_grad_(p in wanted)
        yield chosen
    finally:
        for p, needed in before.items():
            p.requires_grad_(needed)
            p.grad = None


@contextmanager
def _cast_once(models: list[Ling], trained: set[nn.Parameter], config: TrainConfig) -> Iterator[None]:
    """On a CPU, hold frozen matrices in BF16, as autocast would otherwise cast them again in every step; undone afterwards.

    A head that is also the embedding stays: embeddings are read in FP32.
    """
    read = {m.weight for model in models for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {m.weight for model in models for m in model.modules() if isinstance(m, nn.Linear)}
    wide = {p: p.data for p in matrices - read - trained if p.device.type == "cpu" and config.precision == "bf16"}
    try:
        for p, data in wide.items():
            p.data = data.to(torch.bfloat16)
        yield
    finally:
        for p, data in wide.items():
            p.data = data


@contextmanager
def _caught_signals() -> Iterator[Callable[[], int | None]]:
    """Note SIGINT and SIGTERM instead of dying in mid-step; the first one brings the old handlers back for the second."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()

    try:
        for number in before:
            signal.signal(number, note)
        yield lambda: caught[0] if caught else None
    finally:
        restore()


class _Run:
    """One training run in memory."""

    def __init__(
        self,
        model: Ling,
        config: TrainConfig,
        batches: Batches,
        chosen: dict[str, nn.Parameter],
        teacher: Ling | None,
        run: Path,
        *,
        silent: bool,
    ) -> None:
        self.model, self.config, self.batches, self.chosen, self.run = model, config, batches, chosen, run
        self.teacher = teacher if config.kl else None
        self.device = next(model.parameters()).device
        self.head = self._head(model)
        self.teacher_head = None if self.teacher is None else self._head(self.teacher)
        self.optimizer = adamw(list(chosen.values()), config)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        torch.manual_seed(config.seed)
        checkpoint = latest_checkpoint(run)
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, chosen, self.optimizer)
            self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
            batches.load_state_dict(state["data"])
            if self.device.type == "cpu":  # what comes after rounds as what came before did
                settle_bf16_matmuls(state["bf16_products"])
        self.log = MetricsLog(run / "metrics.jsonl", step=self.step)
        self.display = Display(config.total_steps, first_step=self.step, silent=silent, max_seconds=config.max_seconds)

    def go(self) -> TrainResult:
        """Step until something ends the run; the last step is always in a checkpoint."""
        saved_step, saved_at = self.step, time.monotonic()
        began = saved_at - self.seconds
        if self.step:
            self.display.say(f"continuing after step {self.step} of {self.config.total_steps}")
        with self.display, _caught_signals() as caught:
            while (stopped := self._ended(caught())) is None:
                row = self._advance()
                self.seconds = time.monotonic() - began
                self.log.write(row | {"seconds": self.seconds, "memory_bytes": memory_bytes(self.device)})
                self.display.update(self.log.last)
                if self._due(time.monotonic() - saved_at):
                    self._save()
                    saved_step, saved_at = self.step, time.monotonic()
            if saved_step != self.step:
                self._save()
            number = caught()
        self.log.close()
        return TrainResult(self.step, self.tokens, self.seconds, stopped, number if stopped == "signal" else None, self.log.last)

    def _ended(self, caught: int | None) -> Literal["finished", "time", "signal"] | None:
        if self.step >= self.config.total_steps:
            return "finished"
        if caught is not None:
            return "signal"
        limit = self.config.max_seconds
        return "time" if limit is not None and self.seconds >= limit else None

    def _due(self, seconds: float) -> bool:
        c = self.config
        by_steps = c.checkpoint_steps is not None and self.step % c.checkpoint_steps == 0
        return by_steps or (c.checkpoint_seconds is not None and seconds >= c.checkpoint_seconds)

    def _save(self) -> None:
        self.log.sync()
        state = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "data": self.batches.state_dict()}
        state["bf16_products"] = bf16_matmuls_pay() if self.device.type == "cpu" else None
        save_checkpoint(self.run, self.chosen, self.optimizer, state)

    def _advance(self) -> dict[str, Any]:
        """One optimiser step; returns its metrics."""
        started, c = time.monotonic(), self.config
        ids_BT = next(self.batches)
        parts: list[HeadLoss] = []
        for part in ids_BT.to(self.device).chunk(c.accumulation):
            parts.append(self._loss(part))
            (parts[-1].loss / c.accumulation).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.chosen.values()), c.clip))
        row: dict[str, Any] = {"step": self.step + 1, "tokens": self.tokens + ids_BT.numel()}
        for name in ("loss", "ce", "kl"):
            values = [v for part in parts if (v := getattr(part, name)) is not None]
            row[name] = float(sum(v.detach() for v in values) / c.accumulation) if values else None
        row |= {"grad_norm": norm, "lr": learning_rate(self.step, c)}
        if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
            self._fail(row, ids_BT)
        for group in self.optimizer.param_groups:
            group["lr"] = row["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.tokens = row["step"], row["tokens"]
        return row | {"tokens_per_s": ids_BT.numel() / (time.monotonic() - started)}

    def _loss(self, ids_BT: Tensor) -> HeadLoss:
        """The loss of a part of the batch, in BF16 autocast where configured."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            teacher_h = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_h = self.teacher.model(ids_BT)
            return head_loss(
                self.model.model(ids_BT),
                self.head,
                ids_BT,
                teacher_h_BTM=teacher_h,
                teacher_weight_VM=self.teacher_head,
                ce_weight=self.config.ce,
                kl_weight=self.config.kl,
            )

    def _head(self, model: Ling) -> Tensor:
        """A model's head, cast once where it is frozen."""
        weight = model.lm_head.weight
        frozen = model is self.teacher or not weight.requires_grad
        return weight.detach().to(torch.bfloat16) if frozen and self.config.precision == "bf16" else weight

    def _fail(self, row: dict[str, Any], ids_BT: Tensor) -> None:
        """Keep the batch and the culprits; weights, checkpoint and metrics stay as they were before the step."""
        bad = [n for n, p in self.chosen.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
        evidence = self.run / "failure.json"
        text = {name: str(value) for name, value in row.items()}
        write_json(evidence, {"metrics": text, "gradients_not_finite": bad, "input_ids": ids_BT.tolist()})
        raise Failure(
            f"the loss or a gradient is not finite at step {row['step']}",
            where=evidence,
            value=f"loss {row['loss']}, gradient norm {row['grad_norm']}",
            expected="finite numbers",
            next="train into a new folder with a lower learning rate or precision fp32",
        )
