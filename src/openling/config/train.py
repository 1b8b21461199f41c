"""What one training run does; no torch here."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Fields that change neither weights nor metrics up to a given step: a run may resume with other values of them.
FREE_ON_RESUME = ("checkpoint_steps", "checkpoint_seconds", "max_seconds")


class TrainConfig(BaseModel):
    """One run of the training loop. Exactly one of `steps` and `tokens` says how long it is.

    Defaults: AdamW betas, weight decay and clip of Ling 2.0; the learning rate is the measured one for warm-ups of a 135 M model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0)
    batch_size: int = Field(8, gt=0, description="windows per optimiser step")
    accumulation: int = Field(1, gt=0, description="parts in which a batch runs through the model")
    sequence_length: int = Field(512, gt=1, description="tokens per window")
    lr: float = Field(1e-3, gt=0, description="learning rate after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0 in a straight line")
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate of the cosine over `lr`")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0, description="on matrices; vectors have none")
    clip: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    ce: float = Field(1.0, ge=0, description="weight of the next-token cross-entropy")
    kl: float = Field(0.0, ge=0, description="weight of KL(teacher || student)")
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = Field(0, ge=0, lt=2**63)
    checkpoint_steps: int | None = Field(None, gt=0)
    checkpoint_seconds: float | None = Field(120.0, gt=0)
    max_seconds: float | None = Field(None, gt=0, description="stop after the step in which this much training time is reached")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps and tokens")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation = {self.accumulation} does not divide batch_size = {self.batch_size}")
        if self.ce == self.kl == 0:
            raise ValueError("ce and kl are both 0: there is no loss")
        return self

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run; tokens are rounded up to a whole step."""
        return self.steps or -(-(self.tokens or 0) // (self.batch_size * self.sequence_length))
