"""The learning rate of every step."""

from __future__ import annotations

import math

from openling.config.train import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of step 0, 1, ...: a straight rise that reaches `lr` after `warmup_steps`, then constant, a cosine, or constant and a fall.

    constant is WSM's: what a fall would do is done afterwards by merging checkpoints (`weights.merge`).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low, last = config.min_lr_ratio, config.total_steps - 1
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
        return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    if config.schedule == "wsd":
        left = min(1.0, (last - step) / config.decay_steps)
        return config.lr * (low + (1 - low) * max(0.0, left))
    return config.lr
