"""Which parameters train, AdamW over them, and the learning rate of each step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import nn

from openling.config.train import TrainConfig
from openling.errors import UserError, nearest

# Regular expressions, any of which is found in the name; or a function of the name.
ParameterChoice = Sequence[str] | Callable[[str], bool]


def select_parameters(model: nn.Module, choice: ParameterChoice) -> dict[str, nn.Parameter]:
    """The chosen parameters by name, in the model's order; an expression that finds none is a `UserError`."""
    named = dict(model.named_parameters())
    if callable(choice):
        chosen = {name: p for name, p in named.items() if choice(name)}
    else:
        for pattern in choice:
            if not any(re.search(pattern, name) for name in named):
                raise UserError(
                    "no parameter has this name",
                    where="trainable parameters",
                    value=pattern,
                    expected="an expression found in a parameter's name",
                    nearest=nearest(pattern, named),
                )
        chosen = {name: p for name, p in named.items() if any(re.search(pattern, name) for pattern in choice)}
    if not chosen:
        raise UserError("no parameter is chosen for training", where="trainable parameters", expected="at least one")
    return chosen


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of step 0, 1, ...: a straight rise that reaches `lr` after `warmup_steps`, then constant or a cosine to its minimum."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps - 1)
    low = config.min_lr_ratio
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def adamw(parameters: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW with FP32 state; weight decay on matrices alone (norm weights and biases would shrink for no gain)."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
