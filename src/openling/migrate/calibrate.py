"""Layer-by-layer calibration: teacher and student walk through the layers together, and nothing but the residual
streams of the calibration windows is kept. A converted layer is seen by the next one, which is fitted to what it leaves.

Legend: B windows of a batch, T tokens, M hidden size, P features, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openling.migrate.stack import Mapped, MemoryStreams, Stack, Streams, pass_layers, stack_of
from openling.model.ling import CallContext, Layer, Ling, MtpLayer


class Gram:
    """Sums for least squares, FP64: E[z z^T] (P x P) and E[z y^T] (P x O), one batch at a time."""

    def __init__(self) -> None:
        self.zz: Tensor | None = None
        self.zy: Tensor | None = None
        self.count = 0

    def add(self, z: Tensor, y: Tensor | None = None) -> None:
        """Add rows z [..., P] and, for a regression, their targets y [..., O]."""
        z = z.flatten(0, -2).double()
        zz = z.T @ z
        self.zz = zz if self.zz is None else self.zz.add_(zz)
        if y is not None:
            zy = z.T @ y.flatten(0, -2).double()
            self.zy = zy if self.zy is None else self.zy.add_(zy)
        self.count += z.shape[0]

    @property
    def moment(self) -> Tensor:
        """E[z z^T]."""
        assert self.zz is not None
        return self.zz / self.count

    def ridge(self, damping: float, prior: Tensor | None = None) -> Tensor:
        """W [O, P] that minimises sum |W z - y|^2 + lambda |W - prior|^2, lambda = damping * mean diagonal of z z^T.

        Where every z is zero any W does: the prior, or zero.
        """
        assert self.zz is not None and self.zy is not None
        lam = damping * self.zz.diagonal().mean()
        if not self.zz.any():
            return torch.zeros_like(self.zy).T if prior is None else prior.double()
        right = self.zy if prior is None else self.zy + lam * prior.double().T
        damped = self.zz.clone()
        damped.diagonal().add_(lam)
        return torch.linalg.solve(damped, right).T


def relative(part: Tensor | float, energy: Tensor | float, of_nothing: float = 0.0) -> float:
    """A squared error, or the energy that is kept, relative to the whole energy; that may be zero: a dead layer's."""
    return float(part) / float(energy) if float(energy) > 0 else of_nothing


@dataclass
class LayerStep:
    """What a conversion sees at one layer: `layer` is the student's, already holding its new (unfitted) mixer or the old one."""

    index: int
    teacher: Layer
    student: Layer
    teacher_h: Sequence[Tensor]
    student_h: Sequence[Tensor]
    teacher_call: CallContext
    student_call: CallContext

    def inputs(self) -> Iterator[Tensor]:
        """The student's mixer inputs, batch by batch, [B, T, M]."""
        for h in self.student_h:
            yield self.student.input_layernorm(h)

    def mixer_inputs(self, form: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
        """`form` of every batch of `inputs()`, computed anew whenever it is read: no batch stays in memory."""
        return Mapped(self.student_h, lambda h: form(self.student.input_layernorm(h)))

    def targets(self) -> Iterator[Tensor]:
        """What the student's mixer should output, batch by batch: the teacher's mixer output on the teacher's own stream."""
        for h in self.teacher_h:
            yield self.teacher.attention(self.teacher.input_layernorm(h), self.teacher_call)


@torch.no_grad()
def walk(
    teacher: Ling | Stack,
    student: Ling | Stack,
    windows: Sequence[Tensor],
    *,
    bf16: bool,
    streams: Streams | None = None,
) -> Iterator[LayerStep]:
    """Yield every layer in order, MTP layers last; the caller may change the student's layer before the walk passes it.

    `windows` are batches of token ids [B, T] of one length. Forward passes run in BF16 autocast with `bf16`;
    casts are not cached, since weights change on the way. A model that is teacher and student at once is computed once.
    `streams` keeps the residual streams between the layers (in memory by default); a walk begins behind the layers after which
    they were left.
    """
    ids, kept = windows[0], streams or MemoryStreams()
    stacks = [stack_of(teacher), *([] if student is teacher else [stack_of(student)])]
    calls = [CallContext(s.rope(ids), None, None) for s in stacks]
    hidden = stacks[-1].config.num_hidden_layers
    first, h = kept.resume() or (0, kept.keep((tuple(s.embed(w) for s in stacks) for w in windows), 0))
    count = hidden + stacks[-1].config.num_nextn_predict_layers
    for index in range(first, count):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            if index >= hidden:
                ahead = index - hidden + 1
                h = kept.keep(_enter_mtp(stacks, index, h, windows, ahead), None)
            layers = [s.layer(index) for s in stacks]
            yield LayerStep(index, layers[0], layers[-1], h[0], h[-1], calls[0], calls[-1])
            if index + 1 < count:
                h = kept.keep(_through(stacks, index, h, calls), index + 1)


def _through(
    stacks: Sequence[Stack], index: int, streams: list[Sequence[Tensor]], calls: Sequence[CallContext]
) -> Iterator[tuple[Tensor, ...]]:
    """The residual streams after a layer; the last hidden layer's also through the final norm when MTP layers follow."""
    layers, c = [s.layer(index) for s in stacks], stacks[0].config
    ends = index == c.num_hidden_layers - 1 and c.num_nextn_predict_layers > 0
    norms = [
        layer.final_layernorm if isinstance(layer, MtpLayer) else s.norm if ends else None
        for s, layer in zip(stacks, layers, strict=True)
    ]
    for batch in pass_layers(layers, zip(*streams, strict=True), calls):
        yield tuple(h if norm is None else norm(h) for h, norm in zip(batch, norms, strict=True))


def _enter_mtp(
    stacks: Sequence[Stack], index: int, streams: list[Sequence[Tensor]], windows: Sequence[Tensor], ahead: int
) -> Iterator[tuple[Tensor, ...]]:
    """The residual streams inside an MTP layer: hidden states joined with the embeddings of tokens `ahead` further on."""
    for batch, w in zip(zip(*streams, strict=True), windows, strict=True):
        shifted = F.pad(w[:, ahead:], (0, ahead))
        yield tuple(_join(s, index, h, shifted) for s, h in zip(stacks, batch, strict=True))


def _join(stack: Stack, index: int, h: Tensor, shifted: Tensor) -> Tensor:
    layer = stack.layer(index)
    assert isinstance(layer, MtpLayer)
    return layer.join(h, stack.embed(shifted))
