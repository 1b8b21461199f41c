"""Which layers become MLA, by what each one would lose as Lightning (`layout.mla_layers = "selected"`).

Every layer's Lightning mixer is fitted on the teacher's own stream, with no other layer converted, and scored on the last batch
of the calibration windows, which the fits do not see (unless it is the only one):

    kl      KL(teacher || teacher with this layer as Lightning), nats per token of the final distribution
    local   |student - teacher|^2 / |teacher|^2 of the mixer's output; reads one layer at a time, so it works from a folder

The layers with the highest scores stay softmax attention and become MLA. `kl` is the selection of KL-guided conversions
(arXiv 2512.20569) without its greedy rounds; HALO (arXiv 2601.22156) divides a loss of recall by one of commonsense, for which
no task data are at hand here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from openling.config.migrate import Conversion
from openling.errors import UserError
from openling.migrate.calibrate import LayerStep, relative, walk
from openling.migrate.convert import fit_lightning
from openling.migrate.findings import Approximation, Findings
from openling.migrate.stack import ModelStack, Stack, derive_layer, stack_of
from openling.model.config import LayerKind, ModelConfig
from openling.model.ling import Layer, Ling
from openling.ops.loss import head_loss

LayerScore = Literal["kl", "local"]


@dataclass(frozen=True)
class Selection:
    """The layers that become MLA, in order, and the score of every layer."""

    layers: tuple[int, ...]
    scores: tuple[float, ...]

    def findings(self, score: LayerScore) -> Findings:
        """The scores as the report has them."""
        what = {"kl": "KL with this layer alone as Lightning", "local": "relative error of its Lightning mixer"}[score]
        return Findings([Approximation("layer selection", i, what, value) for i, value in enumerate(self.scores)])


@torch.no_grad()
def select_layers(
    teacher: Ling | Stack,
    target: ModelConfig,
    windows: Sequence[Tensor],
    options: Conversion,
    *,
    seed: int,
    bf16: bool,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> Selection:
    """The hidden layers of a GQA model that lose most, as many as are MLA in `target`; `windows` are batches of token ids [B, T].

    target: the hybrid's configuration; which of its layers are MLA does not matter. Of equal scores the later layer wins.
    Raises UserError for the score `kl` of a model that is not in memory.
    """
    stack = stack_of(teacher)
    source = stack.config
    if options.layer_score == "kl" and not isinstance(stack, ModelStack):
        raise UserError(
            "this score runs the rest of the model behind every layer, which has to be in memory",
            where="--conversion.layer_score",
            value="kl",
            expected="local",
            next="openling migrate, or --conversion.layer_score local",
        )
    lightning: LayerKind = "lightning"
    config = target.replace(layer_kinds=(lightning,) * source.num_hidden_layers)
    count = target.layer_kinds.count("mla")
    scores: list[float] = []
    for step in walk(teacher, teacher, windows, bf16=bf16):
        if step.index == source.num_hidden_layers:  # MTP layers never become Lightning
            break
        student = derive_layer(step.teacher, source, config, step.index)
        held_out = len(windows) > 1
        fit = replace(step, student=student, student_h=step.teacher_h)
        fit_lightning(_batches(fit, slice(None, -1)) if held_out else fit, options, seed)
        last = _batches(fit, slice(-1, None))
        scores.append(_divergence(stack, last, windows[-1]) if options.layer_score == "kl" else _local(last))
        on_layer(step.index)
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return Selection(tuple(sorted(ranked[len(scores) - count :])), tuple(scores))


def _batches(step: LayerStep, part: slice) -> LayerStep:
    return replace(step, teacher_h=step.teacher_h[part], student_h=step.student_h[part])


def _local(step: LayerStep) -> float:
    """Relative squared error of the mixer's output."""
    wrong = energy = 0.0
    for x, y in zip(step.inputs(), step.targets(), strict=True):
        found = step.student.attention(x, step.student_call)
        wrong += float((found - y).double().square().sum())
        energy += float(y.double().square().sum())
    return relative(wrong, energy)


def _divergence(stack: Stack, step: LayerStep, ids_BT: Tensor) -> float:
    """KL per token once the rest of the teacher has read what this layer makes of its input."""
    assert isinstance(stack, ModelStack)
    (h,) = step.teacher_h
    both = []
    for layer in (step.teacher, step.student):
        out = Layer.forward(layer, h, step.teacher_call)
        for i in range(step.index + 1, stack.config.num_hidden_layers):
            out = stack.layer(i)(out, step.teacher_call)
        both.append(stack.norm(out))
    head = stack.model.lm_head.weight
    total = 0.0
    for ids, expected, found in zip(ids_BT, *both, strict=True):  # one window's logits at a time
        rows = {"h_BTM": found[None].to(head.dtype), "teacher_h_BTM": expected[None].to(head.dtype)}
        kl = head_loss(**rows, weight_VM=head, teacher_weight_VM=head, input_ids_BT=ids[None]).kl
        assert kl is not None
        total += float(kl)
    return total / len(ids_BT)
