"""Which layers become MLA, by what each one would lose as Lightning (`layout.mla_layers = "selected"`).

Every layer is changed on the teacher's own stream, with no other layer changed, and scored on the last batch of the calibration
windows:

    near    KL(teacher || teacher where this layer reads its first token and the `NEAR` last ones), nats per token: what reading
            far is worth, which is what a recurrence learns worst. Nothing is fitted.
    kl      KL(teacher || teacher with this layer as Lightning), fitted on the other batches (on the only one, if there is one):
            what the layer loses before it is trained, be it easily learned again or not
    local   |student - teacher|^2 / |teacher|^2 of the fitted mixer's output; reads one layer at a time, so it works from a folder

The layers with the highest scores stay softmax attention and become MLA. To read near is what DuoAttention (arXiv 2410.10819)
leaves its streaming heads; `kl` is the selection of KL-guided conversions (arXiv 2512.20569) without its greedy rounds; HALO
(arXiv 2601.22156) divides a loss of recall by one of commonsense, for which no task data are at hand here.

Legend: B windows of a batch, T tokens, M hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openling.config.migrate import NEAR, Conversion
from openling.errors import UserError
from openling.migrate.calibrate import LayerStep, relative, walk
from openling.migrate.convert import fit_lightning
from openling.migrate.findings import Approximation, Findings
from openling.migrate.stack import ModelStack, Stack, derive_layer, stack_of
from openling.model.config import LayerKind, ModelConfig
from openling.model.ling import CallContext, GroupedQueryAttention, Layer, Ling, qk_norm_weights
from openling.ops.fused import split_norm_rope
from openling.ops.loss import head_loss

LayerScore = Literal["near", "kl", "local"]


@dataclass(frozen=True)
class Selection:
    """The layers that become MLA, in order, and the score of every layer."""

    layers: tuple[int, ...]
    scores: tuple[float, ...]

    def findings(self, score: LayerScore) -> Findings:
        """The scores as the report has them."""
        what = {
            "near": "KL where this layer alone reads near",
            "kl": "KL with this layer alone as Lightning",
            "local": "relative error of its Lightning mixer",
        }[score]
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
    Raises UserError for the scores `near` and `kl` of a model that is not in memory.
    """
    stack = stack_of(teacher)
    source = stack.config
    if options.layer_score != "local" and not isinstance(stack, ModelStack):
        raise UserError(
            "this score runs the rest of the model behind every layer, which has to be in memory",
            where="--conversion.layer_score",
            value=options.layer_score,
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
        if options.layer_score == "near":
            scores.append(_divergence(stack, step, _near, windows[-1]))
        else:
            step = _as_lightning(step, derive_layer(step.teacher, source, config, step.index), options, seed)
            local = options.layer_score == "local"
            scores.append(_local(step) if local else _divergence(stack, step, _student, windows[-1]))
        on_layer(step.index)
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return Selection(tuple(sorted(ranked[len(scores) - count :])), tuple(scores))


def _as_lightning(step: LayerStep, student: Layer, options: Conversion, seed: int) -> LayerStep:
    """The step with a student whose mixer is Lightning, fitted on all batches but the last."""
    step = replace(step, student=student, student_h=step.teacher_h)
    fit_lightning(_batches(step, slice(None, -1)) if len(step.teacher_h) > 1 else step, options, seed)
    return step


def _batches(step: LayerStep, part: slice) -> LayerStep:
    return replace(step, teacher_h=step.teacher_h[part], student_h=step.student_h[part])


def _local(step: LayerStep) -> float:
    """Relative squared error of the mixer's output on the last batch."""
    last = _batches(step, slice(-1, None))
    (x,), (y,) = last.inputs(), last.targets()
    wrong = float((step.student.attention(x, step.student_call) - y).double().square().sum())
    return relative(wrong, float(y.double().square().sum()))


def _student(step: LayerStep, x_BTM: Tensor) -> Tensor:
    return step.student.attention(x_BTM, step.student_call)


def _near(step: LayerStep, x_BTM: Tensor) -> Tensor:
    assert isinstance(step.teacher.attention, GroupedQueryAttention)
    return read_near(step.teacher.attention, x_BTM, step.teacher_call, NEAR)


def _divergence(stack: Stack, step: LayerStep, mixer: Callable[[LayerStep, Tensor], Tensor], ids_BT: Tensor) -> float:
    """KL per token of the last batch once the rest of the teacher has read what `mixer` gives in place of this layer's."""
    assert isinstance(stack, ModelStack)
    last, layer = _batches(step, slice(-1, None)), step.teacher
    (h,), (x,) = last.teacher_h, last.inputs()
    both = []
    for mixed in (layer.attention(x, step.teacher_call), mixer(step, x)):
        out, normed = layer.post_attention_layernorm.add(h, mixed)
        out = out + layer.mlp(normed)
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


def read_near(attention: GroupedQueryAttention, x_BTM: Tensor, call: CallContext, near: int) -> Tensor:
    """The mixer's output [B, T, M] where every token reads the first one and the `near` last ones, its own among them."""
    qkv, norms, heads = attention.query_key_value(x_BTM), qk_norm_weights(attention), attention.heads
    parts = split_norm_rope(qkv, norms, call.tables.head, heads=heads, kv_heads=attention.kv_heads, eps=attention.eps)
    q, k, v = (part.transpose(1, 2) for part in parts)
    at = torch.arange(x_BTM.shape[1], device=x_BTM.device)
    back = at[:, None] - at[None]
    mask = (back >= 0) & ((back < near) | (at[None] == 0))
    windows = [  # a window's scores may be in memory, not all windows'
        F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask, scale=attention.dim**-0.5, enable_gqa=True)
        for i in range(len(q))
    ]
    return attention.dense(torch.cat(windows).transpose(1, 2).flatten(2))
