"""What one training run does; no torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from openling.config.section import Section, wrong

# Fields that change neither weights nor metrics up to a given step: a run may resume with other values of them.
FREE_ON_RESUME = ("checkpoint_steps", "checkpoint_seconds", "keep_last", "keep_every", "max_seconds", "max_skips")


class BatchRamp(Section):
    """Smaller batches at first: `stairs` of equal tokens, rising from `start` towards `batch_size`."""

    start: int = Field(gt=0, description="windows of the first batches")
    tokens: int = Field(gt=0, description="tokens after which batches have their full size")
    stairs: int = Field(8, gt=0, le=1000, description="batch sizes on the way; every one is counted before the first step")


class TrainConfig(Section):
    """One run of the training loop. Exactly one of `steps` and `tokens` says how long it is.

    Defaults: AdamW betas, weight decay and clip of Ling 2.0; the learning rate is the measured one for warm-ups of a 135 M model.
    """

    steps: int | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0)
    batch_size: int = Field(8, gt=0, description="windows per optimiser step")
    accumulation: int = Field(1, gt=0, description="parts in which a full batch runs through the model")
    ramp: BatchRamp | None = None
    sequence_length: int = Field(512, gt=1, description="tokens per window")
    lr: float = Field(1e-3, gt=0, description="learning rate after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0 in a straight line")
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    decay_steps: int = Field(0, ge=0, description="of wsd: the last steps, over which the rate falls in a straight line")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate of cosine and wsd over `lr`")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: on matrices and experts; AdamW on the rest")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    weight_decay: float = Field(0.1, ge=0, description="on matrices; vectors have none")
    clip: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    ce: float = Field(1.0, ge=0, description="weight of the next-token cross-entropy")
    kl: float = Field(0.0, ge=0, description="weight of KL(teacher || student)")
    align: float = Field(0.0, ge=0, description="weight of the relative squared error of the residual streams, over layers")
    z: float = Field(0.0, ge=0, description="weight of the squared log-sum-exp of the logits")
    mtp: float = Field(0.0, ge=0, description="weight of the mean loss of the multi-token prediction steps")
    mtp_steps: int | None = Field(None, gt=0, description="null: one per MTP layer; more: the layers are shared in turn")
    mtp_detach: Literal["none", "later", "all"] = Field(
        "none", description="which MTP steps send the base no gradient; later: all but the first"
    )
    bias_rate: float = Field(0.0, ge=0, description="of the router's bias towards balance, per step; 0 leaves it alone")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="of matrix products; auto: bf16 on GPUs and on CPUs that multiply it faster than fp32"
    )
    fp8_experts: Literal["none", "rowwise", "blockwise"] = Field(
        "none", description="FP8 products of the routed experts, by how they are scaled; needs the extra fp8 and an H100 or H200"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    checkpoint_steps: int | None = Field(None, gt=0)
    checkpoint_seconds: float | None = Field(120.0, gt=0)
    keep_last: int = Field(1, gt=0, description="checkpoints that stay")
    keep_every: int | None = Field(None, gt=0, description="checkpoints of every so many steps stay too, for merging")
    max_seconds: float | None = Field(None, gt=0, description="stop after the step in which this much training time is reached")
    max_skips: int = Field(0, ge=0, description="steps in a row that may be left out for a bad loss or gradient")
    spike_norm: float | None = Field(None, gt=1, description="leave a step out whose gradient norm is so many recent medians")
    spike_loss: float | None = Field(None, gt=0, description="leave a step out whose loss is so many nats above recent ones")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps and tokens")
        if self.batch_size % self.accumulation:
            fewer = next(n for n in range(min(self.accumulation, self.batch_size), 0, -1) if self.batch_size % n == 0)
            what = f"accumulation = {self.accumulation} does not divide batch_size = {self.batch_size}"
            raise wrong(what, f"accumulation = {fewer}")
        if self.ce == self.kl == self.align == 0:
            raise ValueError("ce, kl and align are all 0: there is no loss")
        if (self.schedule == "wsd") != bool(self.decay_steps):
            raise ValueError("the schedule wsd and decay_steps go together")
        if self.decay_steps and self.decay_steps + self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps and decay_steps are more than the {self.total_steps} steps of the run")
        if self.fp8_experts != "none" and self.precision == "fp32":
            raise ValueError(f"fp8_experts = {self.fp8_experts} needs BF16 around it: precision must not be fp32")
        if self.keep_every and self.keep_every % (self.checkpoint_steps or self.keep_every + 1):
            every = self.checkpoint_steps
            close = f"checkpoint_steps = {self.keep_every}"
            close = f"keep_every = {max(1, round(self.keep_every / every)) * every}" if every else close
            raise wrong("keep_every must be a multiple of checkpoint_steps", close)
        if self.ramp and self.ramp.start > self.batch_size:
            raise wrong(f"ramp.start must be at most batch_size = {self.batch_size}", f"ramp.start = {self.batch_size}")
        return self

    @property
    def follows(self) -> bool:
        """Whether the loss needs a teacher."""
        return self.kl > 0 or self.align > 0

    @property
    def part_size(self) -> int:
        """Windows that run through the model at once."""
        return self.batch_size // self.accumulation

    @property
    def stairs(self) -> tuple[tuple[int, int], ...]:
        """(first step behind it, windows) of each smaller batch size, in order; sizes are whole parts, or less than one."""
        if self.ramp is None:
            return ()
        found, stop, r = [], 0, self.ramp
        for i in range(r.stairs):
            rows = r.start + (self.batch_size - r.start) * i // r.stairs
            rows -= rows % self.part_size if rows > self.part_size else 0
            stop += -(-r.tokens // (r.stairs * rows * self.sequence_length))
            found.append((stop, rows))
        return tuple(found)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run; tokens are rounded up to a whole step."""
        if self.steps is not None:
            return self.steps
        left, done = self.tokens or 0, 0
        for stop, rows in self.stairs:
            size = rows * self.sequence_length
            if left <= (stop - done) * size:
                return done + -(-left // size)
            left -= (stop - done) * size
            done = stop
        return done + -(-left // (self.batch_size * self.sequence_length))

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run, its smaller first batches counted."""
        found, start, total = 0, 0, self.total_steps
        for stop, rows in self.stairs:
            found += max(0, min(stop, total) - start) * rows
            start = min(stop, total)
        return (found + (total - start) * self.batch_size) * self.sequence_length

    def differences(self, old: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Fields in which a run that resumes may not differ from `old`, with both values.

        A longer run is the same where no learning rate depends on its end; other parts of a batch are, but for the order of sums,
        where none of a ramp's batches depends on them.
        """
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        free = {*FREE_ON_RESUME, *(("steps", "tokens") if self.schedule == "constant" else ())}
        free |= {"accumulation"} if self.ramp is None else set()
        mine = self.model_dump(mode="json")
        pairs = {name: (value, old.get(name, defaults[name])) for name, value in mine.items() if name not in free}
        return {name: both for name, both in pairs.items() if both[0] != both[1]}
