"""Which layers become MLA: those with the highest scores (`layout.mla_layers = "selected"`, `conversion.layer_score`).

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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    """The hidden layers of a GQA model with the highest scores, as many as are MLA in `target`.

    target: the hybrid's configuration; which of its layers are MLA does not matter. windows: batches of token ids [B, T].
    Of equal scores the later layer wins.
    Raises UserError for the scores `near` and `kl` of a model that is not in memory.
    """
    stack, scores = stack_of(teacher), list[float]()
    for score in _scores(stack, target, windows, options, seed=seed, bf16=bf16):
        on_layer(len(scores))
        scores.append(score)
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return Selection(tuple(sorted(ranked[len(scores) - target.layer_kinds.count("mla") :])), tuple(scores))


def _scores(
    stack: Stack, target: ModelConfig, windows: Sequence[Tensor], options: Conversion, *, seed: int, bf16: bool
) -> Iterator[float]:
    """The score of every hidden layer, in order."""
    layers = stack.config.num_hidden_layers
    check_score(options.layer_score, in_memory=isinstance(stack, ModelStack))
    rest = _Rest(stack, windows[-1]) if isinstance(stack, ModelStack) and options.layer_score != "local" else None
    if options.layer_score == "near":
        assert rest is not None
        for index in range(layers):
            attention = stack.layer(index).attention
            assert isinstance(attention, GroupedQueryAttention)
            yield rest.divergence(partial(read_near, attention, near=NEAR))
        return
    lightning: LayerKind = "lightning"
    config = target.replace(layer_kinds=(lightning,) * layers)
    for step in walk(stack, stack, windows, bf16=bf16):
        if step.index == layers:  # MTP layers never become Lightning
            return
        step = _as_lightning(step, derive_layer(step.teacher, stack.config, config, step.index), options, seed)
        yield _local(step) if rest is None else rest.divergence(step.student.attention)


def check_score(score: LayerScore, *, in_memory: bool) -> None:
    """A UserError for a score that needs the whole model where it is not in memory."""
    if score != "local" and not in_memory:
        raise UserError(
            "this score runs the rest of the model behind every layer, which has to be in memory",
            where="--conversion.layer_score",
            value=score,
            expected="local",
            next="openling migrate, or --conversion.layer_score local",
        )


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


class _Rest:
    """The teacher's own passes over a batch, layer by layer, and what the rest of it makes of another mixer in one of them.

    No autocast: what BF16 products round away adds up over the layers to as much as many a layer's score.
    """

    def __init__(self, stack: ModelStack, ids_BT: Tensor) -> None:
        self.stack, self.ids, self.index = stack, ids_BT, 0
        self.call = CallContext(stack.rope(ids_BT), None, None)
        with torch.autocast(ids_BT.device.type, enabled=False):
            self.stream = stack.embed(ids_BT)  # in front of layer `index`
            self.ends = self._behind(self.stream)

    def divergence(self, mixer: Callable[[Tensor, CallContext], Tensor]) -> float:
        """KL(teacher || teacher with this mixer in layer `index`), nats per token; then on to the next layer."""
        layer = self.stack.layer(self.index)
        with torch.autocast(self.ids.device.type, enabled=False):
            h, normed = layer.post_attention_layernorm.add(self.stream, mixer(layer.input_layernorm(self.stream), self.call))
            self.stream, self.index = layer(self.stream, self.call), self.index + 1
            return self._kl(self._behind(h + layer.mlp(normed)))

    def _behind(self, h_BTM: Tensor) -> Tensor:
        """The final hidden states of a stream in front of layer `index`."""
        for i in range(self.index, self.stack.config.num_hidden_layers):
            h_BTM = self.stack.layer(i)(h_BTM, self.call)
        return self.stack.norm(h_BTM)

    def _kl(self, found_BTM: Tensor) -> float:
        head, total = self.stack.model.lm_head.weight, 0.0
        for ids, expected, found in zip(self.ids, self.ends, found_BTM, strict=True):  # one window's logits at a time
            kl = head_loss(found[None], head, ids[None], teacher_h_BTM=expected[None], teacher_weight_VM=head).kl
            assert kl is not None
            total += float(kl)
        return total / len(self.ids)


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
