"""The one training loop: FP32 master weights, BF16 autocast, exact resume; pre-training, continued training and warm-ups.

    read a batch -> losses and gradients, part by part -> clip -> judge -> update weights and router biases -> log -> checkpoint

On several ranks every rank runs it on its own rows, or its slice of rows that others share (`ranks`); what is judged, counted and
agreed is the same on all, and the main rank writes and speaks.

A run folder holds `train.json`, `metrics.jsonl`, `checkpoints/` and, where steps were left out, `evidence/`. A run that was
stopped and resumed ends with the same bits as one that was not, on the same machine: on a CPU always, on CUDA under
`torch.use_deterministic_algorithms(True)` (without it two uninterrupted runs differ as well).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openling.config.train import TrainConfig
from openling.data.batches import BatchSource, PackedBatch, check_fingerprint
from openling.data.prefetch import Prefetcher
from openling.errors import UserError
from openling.model.ling import Ling
from openling.ops.cpu import bf16_matmuls_pay, half_products, settle_bf16_matmuls
from openling.parallel.apply import Parallel
from openling.parallel.matrices import matrices
from openling.parallel.pipeline import Pipeline
from openling.train.balance import Balance, imbalance
from openling.train.checkpoint import (
    Saver,
    load_checkpoint,
    load_start,
    sole_writer,
    trained_tensors,
    whole_checkpoint,
    write_json,
)
from openling.train.flops import mean_keys, peak_flops, training_flops
from openling.train.fp8 import experts_in_fp8
from openling.train.guard import Guard
from openling.train.metrics import PLAIN_LINE_SECONDS, Display, MetricsLog, memory_bytes
from openling.train.objective import Loss, Part, counts, mtp_steps, objective, objective_of, prepare, to_device
from openling.train.optim import Optimizers, ParameterChoice, select_names
from openling.train.ranks import Ranks
from openling.train.rules import check_losses, check_parts, check_recorded, read_record
from openling.train.schedule import learning_rate
from openling.train.trackers import Tracker
from openling.train.while_training import cast_once, caught_signals, in_training, only_gradients_of, own_memory

# Above any signal's number, among which ranks find the highest.
NOT_WRITTEN = 1 << 10
# The loss and its terms, as the metrics have them.
TERMS = ("loss", "ce", "kl", "align", "z", "mtp")


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
    batches: BatchSource,
    *,
    parameters: ParameterChoice,
    run: Path,
    teacher: Ling | None = None,
    resume: bool = False,
    progress: bool | float = True,
    start: Path | None = None,
    ranks: Ranks | None = None,
    trackers: Sequence[Tracker] = (),
) -> TrainResult:
    """Train the chosen parameters of `model` in place on `batches`.

    parameters: regular expressions for names, or a function of the name; all others are frozen and get no gradient.
    teacher: needed when `config.follows`. run: the folder for metrics and checkpoints. resume: continue it; when it holds no
    run that is a `UserError`, and so is a run of another configuration. progress: False for silence, or seconds between lines.
    start: a checkpoint of an earlier stage, whose weights and optimiser state a new run begins with. ranks: those over which
    `parallel.apply` spread `model` (and the teacher); `batches` give the rows of `ranks.mesh.data_rank`, and every rank calls.
    A loss or gradient that is not finite is a `Failure` that names the step, before any weight changes, unless
    `config.max_skips` lets it be left out; `evidence/` keeps the batch.
    """
    if batches.tokens_per_step != (expected := config.batch_size * config.sequence_length):
        raise UserError("the batches are not of the configured shape", value=batches.tokens_per_step, expected=expected)
    check_losses(config, model.config, teacher=teacher is not None)
    models = [model, teacher] if teacher is not None and config.follows else [model]
    ranks = ranks or Ranks(Parallel(model, None, {}))
    check_parts(config, ranks.data_ranks)
    if config.follows and ranks.parallel.pipeline is not None:
        term = "kl" if config.kl else "align"
        raise UserError(
            "teachers are not cut into pipeline stages", where=term, value=getattr(config, term), expected="0, or no pipeline"
        )
    here = dict(model.named_parameters())
    device = next(iter(here.values())).device
    config = ranks.told(lambda: settled(config, device, run))
    names = select_names(list(ranks.parallel.parts) or list(here), parameters)
    chosen = {name: here[name] for name in names if name in here}
    if ranks.agreed(not chosen):
        some = f"of {len(names)} chosen tensors some in every stage"
        raise UserError("a pipeline stage has nothing to train", where="trainable parameters", expected=some)
    with ExitStack() as stack:
        own_memory(teacher, chosen)
        ranks.told(lambda: stack.enter_context(sole_writer(run)))
        stack.enter_context(only_gradients_of(model, chosen))
        stack.enter_context(in_training(model))
        stack.enter_context(experts_in_fp8(model, config, device))
        ranks.told(lambda: _enter_run(run, config, names, resume))
        stack.enter_context(cast_once(models, set(chosen.values()), config))
        every = PLAIN_LINE_SECONDS if isinstance(progress, bool) else progress
        display = (progress is not False, every)
        entered = _Run(model, config, batches, chosen, teacher, run, display, start, ranks, trackers)
        if not resume:  # nothing is refused any more
            record = {"config": config.model_dump(mode="json"), "parameters": names}
            ranks.told(lambda: write_json(run / "train.json", record))
        return entered.go()


def settled(config: TrainConfig, device: torch.device, run: Path) -> TrainConfig:
    """The configuration with a precision in place of "auto": the one that `run` began with, else the device's faster one."""
    if config.precision != "auto":
        return config
    path = run / "train.json"
    begun = _begun(path)["config"] if path.exists() else {}
    return config.model_copy(update={"precision": begun.get("precision", "bf16" if half_products(device) else "fp32")})


def _begun(path: Path) -> dict[str, Any]:
    """What a run began with."""
    old = read_record(path, f"put it back, or remove {path.parent} and train again")
    if not ("config" in old and "parameters" in old):
        raise UserError("a record of the run cannot be read", where=path, value=", ".join(old), expected="config, parameters")
    return old


def _enter_run(run: Path, config: TrainConfig, names: list[str], resume: bool) -> None:
    """Whether a run can begin here, or go on as `train.json` says."""
    path = run / "train.json"
    check_recorded(run)
    if resume and not path.exists():
        raise UserError(
            "there is nothing to resume", where=run, expected="train.json of an earlier run", next="the same without --resume"
        )
    if not resume and path.exists():
        raise UserError(
            "the folder holds a run already", where=run, expected="a new folder", next="add --resume, or choose another"
        )
    if not resume:
        return
    old = _begun(path)
    for field, (value, before) in config.differences(old["config"]).items():
        raise UserError("the run has another configuration", where=field, value=value, expected=before)
    if different := sorted(set(old["parameters"]) ^ set(names)):
        raise UserError("the run trains other parameters", where=different[0], expected=f"{len(old['parameters'])} as in {path}")


class _Run:
    """One training run in memory."""

    def __init__(
        self,
        model: Ling,
        config: TrainConfig,
        batches: BatchSource,
        chosen: dict[str, nn.Parameter],
        teacher: Ling | None,
        run: Path,
        display: tuple[bool, float],
        start: Path | None,
        ranks: Ranks,
        trackers: Sequence[Tracker],
    ) -> None:
        self.model, self.config, self.batches, self.run, self.ranks = model, config, batches, run, ranks
        self.device = next(model.parameters()).device
        self.all_train = len(chosen) == sum(1 for _ in model.parameters())
        self.held = ranks.parallel.held(chosen)
        self.teacher = teacher if config.follows else None
        self.heads = self._frozen_heads([model] if self.teacher is None else [model, self.teacher])
        self.optimizers = Optimizers(self.held, config, matrices(ranks.parallel, self.held))
        self.balance, self.guard = Balance(model, config.bias_rate, ranks.summed), Guard(run, config, ranks.number)
        self.saver = Saver(run, ranks, keep_last=config.keep_last, keep_every=config.keep_every)
        self.mtp, self.peak = mtp_steps(model, config), peak_flops(self.device)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.by_source: dict[str, int] = {}
        torch.manual_seed(config.seed)
        notes: list[str] = []
        checkpoint = whole_checkpoint(run, notes.append, ranks.saving)
        if checkpoint is not None:
            self._restore(checkpoint)
        elif start is not None:
            load_start(start, model, self.optimizers, ranks)
        if ranks.mesh is not None and self.device.type == "cpu" and checkpoint is None:
            settle_bf16_matmuls(ranks.told(bf16_matmuls_pay))  # all ranks round alike
        self.log = MetricsLog(run / "metrics.jsonl", step=self.step) if ranks.main else None
        self.last: dict[str, Any] = self.log.last if self.log else {}
        self.trackers = trackers if ranks.main else ()
        spoken, every = display
        limit = config.max_seconds
        silent = not (spoken and ranks.main)
        self.display = Display(config.total_steps, first_step=self.step, silent=silent, max_seconds=limit, every=every)
        if config.warmup_steps >= config.total_steps:
            notes.append(f"the learning rate rises over {config.warmup_steps} steps, and the run has {config.total_steps}")
        for line in notes:
            self.display.say(line)

    def _restore(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.ranks, trained_tensors(self.model, self.held), self.optimizers)
        check_fingerprint(self.batches, state["data"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.by_source = state["tokens_by_source"]
        self.guard.load_state_dict(state["guard"])
        if self.device.type == "cpu":  # what comes after rounds as what came before did
            settle_bf16_matmuls(state["bf16_products"])

    def go(self) -> TrainResult:
        """Step until something ends the run; the last step is always in a checkpoint."""
        saved_step, saved_at = self.step, time.monotonic()
        began = saved_at - self.seconds
        if self.step:
            self.display.say(f"continuing after step {self.step} of {self.config.total_steps}")
        try:
            with self.display, caught_signals() as caught, Prefetcher(self.batches, prepare=self._pinned) as source:
                self.balance.clear()
                stall = 0.0
                while (stopped := self._ended(number := self._interrupted(caught() or 0))) is None:
                    row = self._advance(source)
                    self.seconds = time.monotonic() - began
                    self._tell(row | {"seconds": self.seconds, "data_seconds": source.last_wait_seconds, "save_seconds": stall})
                    stall = 0.0
                    if self._due(time.monotonic() - saved_at):
                        paused = time.monotonic()
                        self._save()
                        saved_step, saved_at = self.step, time.monotonic()
                        stall = saved_at - paused
                if saved_step != self.step:
                    self._save()
        finally:
            self.saver.wait()
            if self.log:
                self.log.close()
            for tracker in self.trackers:
                tracker.finish()
        return TrainResult(self.step, self.tokens, self.seconds, stopped, number if stopped == "signal" else None, self.last)

    def _pinned(self, batch: PackedBatch) -> PackedBatch:
        """Ready to be copied to a GPU. It runs in a thread, which would else pin for the first GPU of the machine."""
        if self.device.type != "cuda":
            return batch
        torch.cuda.set_device(self.device)
        return batch.pin_memory()

    def _tell(self, row: dict[str, Any]) -> None:
        """A step's metrics to everybody who wants them."""
        row |= {"memory_bytes": memory_bytes(self.device)}
        self.last = row
        if self.log:
            self.log.write(row)
        self.display.update(row)
        for tracker in self.trackers:
            tracker.log(row)

    def _interrupted(self, caught: int) -> int:
        """The signal that any rank has caught, or 0. A checkpoint that could not be written is an error now, not when the next is
        due: what is trained until then would be lost as well.
        """
        number = self.ranks.highest(NOT_WRITTEN if self.saver.failed else caught)
        if number == NOT_WRITTEN:  # by all ranks' threads, some of which may not have noticed yet
            self.saver.wait()
        return number

    def _ended(self, caught: int) -> Literal["finished", "time", "signal"] | None:
        if self.step >= self.config.total_steps:
            return "finished"
        limit = self.config.max_seconds
        if caught:
            return "signal"
        return "time" if limit is not None and self.ranks.agreed(self.seconds >= limit) else None

    def _due(self, seconds: float) -> bool:
        c = self.config
        if c.checkpoint_steps is not None and self.step % c.checkpoint_steps == 0:
            return True
        if c.checkpoint_seconds is None:
            return False
        # The clock's turn waits where a slow disk still takes in the one before: training need not.
        return self.ranks.highest(2 if self.saver.busy else int(seconds >= c.checkpoint_seconds)) == 1

    def _save(self) -> None:
        if self.log:
            self.log.sync()
        state = {
            "ranks": self.ranks.count,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data": self.batches.fingerprint(),
            "tokens_by_source": self.by_source,
            "guard": self.guard.state_dict(),
            "bf16_products": bf16_matmuls_pay() if self.device.type == "cpu" else None,
        }
        self.saver.save(trained_tensors(self.model, self.held), self.optimizers, state)

    def _advance(self, source: Prefetcher) -> dict[str, Any]:
        """One optimiser step; returns its metrics."""
        started, c, ranks = time.monotonic(), self.config, self.ranks
        batch = source.batch(self.step)
        pieces = batch.split(max(1, batch.ids.shape[0] * ranks.data_ranks // c.part_size))
        parts = [prepare(piece, self.mtp, ranks.parallel.context_group) for piece in pieces]
        targets = ranks.summed(counts(parts))
        if ranks.parallel.pipeline is not None:
            losses = [self._pipelined(ranks.parallel.pipeline, parts, targets)]
        else:
            losses = [self._backward(part, targets, last=part is parts[-1]) for part in parts]
        norm = float(ranks.parallel.clip(self.held, c.clip))
        tokens = int(ranks.summed(torch.tensor(sum(part.ids_BT.numel() for part in parts))))
        row: dict[str, Any] = {"step": self.step + 1, "tokens": self.tokens + tokens} | self._means(losses)
        row |= {"grad_norm": norm, "lr": learning_rate(self.step, c)}
        loads = self.balance.take()
        mean, layers = (None, 0) if loads is None else (imbalance(loads), len(loads))
        row["imbalance"] = ranks.mean_over_stages(mean, layers)
        self._update(row, batch, loads)
        for name, count in ranks.merged(batch.tokens_by_source).items():
            self.by_source[name] = self.by_source.get(name, 0) + count
        self.step, self.tokens = row["step"], row["tokens"]
        seconds = time.monotonic() - started
        row |= {"tokens_per_s": tokens / seconds, "mfu": None}
        if self.peak is not None and self.all_train:
            flops = training_flops(self.model.config, batch.ids.numel(), mean_keys(batch.cu_seqlens), self.mtp)
            row["mfu"] = flops / ranks.sharers / seconds / self.peak
        return row | ({"tokens_by_source": dict(self.by_source)} if self.by_source else {})

    def _backward(self, part: Part, targets: Tensor, *, last: bool) -> Loss:
        """The loss of a part of the batch, in BF16 autocast where configured, and its gradients."""
        parallel, here = self.ranks.parallel, to_device(part, self.device)
        parallel.last_of_step(last)

        def compute() -> Loss:
            group = parallel.tensor_group
            return objective(self.model, here, targets, self.config, head=self._head, teacher=self.teacher, tensor=group)

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = parallel.run(compute)
        loss.loss.backward()
        return loss

    def _pipelined(self, pipeline: Pipeline, parts: list[Part], targets: Tensor) -> Loss:
        """The same for all parts of the batch; the sums of their shares, detached."""
        here, group = [to_device(part, self.device) for part in parts], self.ranks.parallel.tensor_group
        present = [name for name, is_in in (("ce", True), ("z", self.config.z), ("mtp", self.mtp)) if is_in]

        def finish(number: int, h: Tensor) -> tuple[Tensor, Tensor]:
            loss = objective_of(h, self.model, here[number], targets, self.config, head=self._head, tensor=group)
            return loss.loss, torch.stack([getattr(loss, name) for name in present]).detach()

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            total, terms = pipeline.step(here, finish, len(present))
        found = dict(zip(present, terms, strict=True))
        return Loss(total, found["ce"], None, found.get("z"), found.get("mtp"))

    def _means(self, losses: list[Loss]) -> dict[str, float | None]:
        """The batch's losses: sums of the parts' and ranks' shares."""
        names = [name for name in TERMS if getattr(losses[0], name) is not None]
        sums = torch.stack([torch.stack([getattr(one, name).detach() for one in losses]).sum() for name in names])
        found = dict(zip(names, self.ranks.summed(sums).tolist(), strict=True))
        return {name: found.get(name) for name in TERMS}

    def _update(self, row: dict[str, Any], batch: PackedBatch, loads: Tensor | None) -> None:
        """Weights and router biases, unless the step is bad."""
        why = self.guard.verdict(row["loss"], row["grad_norm"])
        if self.ranks.agreed(why is not None):  # ranks with the same tokens may round differently: one verdict for all
            why = why or "another rank judged so"
            row["skipped"] = why
            self.guard.bad(why, row, batch, self.held)
            self.optimizers.zero_grad()
            return
        self.guard.good(row["loss"], row["grad_norm"])
        self.optimizers.step(row["lr"])
        if loads is not None:
            self.balance.update(loads)

    def _frozen_heads(self, models: list[Ling]) -> dict[Ling, Tensor]:
        """Heads that do not change, cast once; not those that FSDP gathers."""
        found = {}
        for model in models:
            if not isinstance(model.lm_head, nn.Linear):  # on another rank of a pipeline
                continue
            weight = model.lm_head.weight
            frozen = model is not self.model or not weight.requires_grad
            if frozen and self.config.precision == "bf16" and not isinstance(weight, DTensor):
                found[model] = weight.detach().to(torch.bfloat16)
        return found

    def _head(self, model: Ling) -> Tensor:
        """A model's head as it is multiplied."""
        return self.heads.get(model, model.lm_head.weight)
