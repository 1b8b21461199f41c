"""Merging the checkpoints of a training run: their unrounded weights, before anything is cast to what a folder stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openling.errors import UserError
from openling.model.ling import Ling
from openling.ops.loss import head_loss
from openling.train.checkpoint import checkpoints, damage
from openling.train.reading import open_checkpoint
from openling.weights.merge import coefficients, weighted_sum


def chosen_checkpoints(run: Path, *, last: int | None = None, steps: Sequence[int] = ()) -> dict[int, Path]:
    """Some checkpoints of a run by step: the last few, those of these steps, or all. Absent and damaged ones are `UserError`s."""
    if last is not None and last < 1:
        raise UserError("there is nothing to merge", where="--last", value=last, expected="1 or more")
    found = checkpoints(run)
    wanted = list(steps) or list(found)[-(last or len(found)) :]
    listed = ", ".join(map(str, found)) or "none"
    if missing := [s for s in wanted if s not in found]:
        raise UserError("the run has no checkpoint of this step", where=run, value=missing[0], expected=listed)
    if last is not None and len(wanted) < last:
        raise UserError(
            "the run has fewer checkpoints than are to be merged", where=run, value=f"{len(found)}: {listed}", expected=last,
            next="checkpoint_steps and keep_every say which ones stay; a smaller --last, or merge.last of the recipe",
        )  # fmt: skip
    if not wanted:
        raise UserError("the run has no checkpoint", where=run)
    for step in wanted:
        if wrong := damage(found[step]):
            raise UserError(
                "a checkpoint is damaged", where=found[step], value=wrong,
                next="leave it out: other --steps of `openling merge`, or a smaller merge.last of the recipe",
            )  # fmt: skip
    return {step: found[step] for step in sorted(wanted)}


@torch.inference_mode()
def held_out_loss(model: Ling, windows_NT: Tensor) -> float:
    """Mean next-token loss on token windows, nats."""
    head = model.lm_head.weight
    losses = [head_loss(model.model(ids), head, ids).ce for ids in windows_NT.to(head.device).split(1)]
    return float(torch.stack(losses).double().mean())


def best_checkpoints(
    model: nn.Module, sources: dict[int, Path], count: int, loss: Callable[[], float]
) -> tuple[dict[int, Path], dict[int, float]]:
    """The `count` checkpoints with the lowest loss of the model they make, oldest first, and the loss of every one by step.

    Ling 2.0 ends its mid-training so, with 32 (arXiv 2510.22115). The model is left with the weights of the newest.
    """
    if count > len(sources):
        raise UserError("the run has fewer checkpoints than are to be merged", where="--best", value=len(sources), expected=count)
    found = {}
    for step, path in sources.items():
        merge_into(model, {step: path}, "mean")
        found[step] = loss()
    best = sorted(sources, key=lambda step: found[step])[:count]
    return {step: sources[step] for step in sorted(best)}, found


@torch.no_grad()
def merge_into(model: nn.Module, sources: dict[int, Path], weighting: str) -> dict[str, Any]:
    """Put the weighted mean of these checkpoints into the model, one tensor at a time; returns what to write down about it."""
    weights = coefficients(weighting, len(sources))
    mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    opened = [open_checkpoint(path) for path in sources.values()]
    for key in (k for k in opened[-1].shapes if k.startswith("model/")):
        name = key.removeprefix("model/")
        if name not in mine:
            raise UserError("the checkpoint is of another model", where=name)
        mine[name].copy_(weighted_sum([one.whole(key) for one in opened], weights, name))
    return {"merged": [{"step": step, "weight": c} for step, c in zip(sources, weights, strict=True)], "weighting": weighting}
