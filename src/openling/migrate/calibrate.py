"""Layer-by-layer calibration: teacher and student walk through the layers together, and nothing but the residual
streams of the calibration windows is kept. A converted layer is seen by the next one, so errors are corrected as they arise.

Legend: B windows of a batch, T tokens, M hidden size, P features, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
        self.zz = zz if self.zz is None else self.zz + zz
        if y is not None:
            zy = z.T @ y.flatten(0, -2).double()
            self.zy = zy if self.zy is None else self.zy + zy
        self.count += z.shape[0]

    @property
    def moment(self) -> Tensor:
        """E[z z^T]."""
        assert self.zz is not None
        return self.zz / self.count

    def ridge(self, damping: float, prior: Tensor | None = None) -> Tensor:
        """W [O, P] that minimises sum |W z - y|^2 + lambda |W - prior|^2, lambda = damping * mean diagonal of z z^T."""
        assert self.zz is not None and self.zy is not None
        lam = damping * self.zz.diagonal().mean()
        right = self.zy if prior is None else self.zy + lam * prior.double().T
        eye = torch.eye(self.zz.shape[0], dtype=self.zz.dtype, device=self.zz.device)
        return torch.linalg.solve(self.zz + lam * eye, right).T


@dataclass
class LayerStep:
    """What a conversion sees at one layer: `layer` is the student's, already holding its new (unfitted) mixer or the old one."""

    index: int
    teacher: Layer
    student: Layer
    teacher_h: list[Tensor]
    student_h: list[Tensor]
    teacher_call: CallContext
    student_call: CallContext

    def inputs(self) -> Iterator[Tensor]:
        """The student's mixer inputs, batch by batch, [B, T, M]."""
        for h in self.student_h:
            yield self.student.input_layernorm(h)

    def targets(self, correct_residual: bool) -> Iterator[Tensor]:
        """What the student's mixer should output, batch by batch: the teacher's mixer output on the teacher's own stream.

        With `correct_residual`, plus the difference that earlier layers left between the two residual streams.
        """
        for teacher_h, student_h in zip(self.teacher_h, self.student_h, strict=True):
            y = self.teacher.attention(self.teacher.input_layernorm(teacher_h), self.teacher_call)
            yield y + (teacher_h - student_h) if correct_residual else y


@torch.no_grad()
def walk(teacher: Ling, student: Ling, windows: Sequence[Tensor], *, bf16: bool = True) -> Iterator[LayerStep]:
    """Yield every layer in order, MTP layers last; the caller may change the student's layer before the walk passes it.

    `windows` are batches of token ids [B, T] of one length. Forward passes run in BF16 autocast unless told otherwise;
    casts are not cached, since weights change on the way.
    """
    ids = windows[0]
    models = teacher, student
    calls = [CallContext(m.model.rope(ids, 0, None), None, None) for m in models]
    streams = [[m.model.word_embeddings(w) for w in windows] for m in models]
    hidden = student.config.num_hidden_layers
    for index in range(len(student.model.layers)):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            if index >= hidden:
                ahead = index - hidden + 1
                streams = [_enter_mtp(m, index, h, windows, ahead) for m, h in zip(models, streams, strict=True)]
            layers = [m.model.layer(index) for m in models]
            yield LayerStep(index, layers[0], layers[1], streams[0], streams[1], calls[0], calls[1])
            streams = [_through(m, index, h, call) for m, h, call in zip(models, streams, calls, strict=True)]


def _through(model: Ling, index: int, stream: list[Tensor], call: CallContext) -> list[Tensor]:
    """The residual stream after a layer; the last hidden layer's also through the final norm when MTP layers follow."""
    layer = model.model.layer(index)
    out = [Layer.forward(layer, h, call) for h in stream]
    if isinstance(layer, MtpLayer):
        return [layer.final_layernorm(h) for h in out]
    ends = index == model.config.num_hidden_layers - 1 and bool(model.model.mtp_layers())
    return [model.model.norm(h) for h in out] if ends else out


def _enter_mtp(model: Ling, index: int, stream: list[Tensor], windows: Sequence[Tensor], ahead: int) -> list[Tensor]:
    """The residual stream inside an MTP layer: hidden states joined with the embeddings of tokens `ahead` further on."""
    layer = model.model.layer(index)
    assert isinstance(layer, MtpLayer)
    embedded = [model.model.word_embeddings(F.pad(w[:, ahead:], (0, ahead))) for w in windows]
    return [layer.join(h, e) for h, e in zip(stream, embedded, strict=True)]
