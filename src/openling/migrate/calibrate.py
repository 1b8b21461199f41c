"""Layer-by-layer calibration: teacher and student walk through the layers together, and nothing but the residual
streams of the calibration windows is kept. A converted layer is seen by the next one, so errors are corrected as they arise.

Legend: B windows of a batch, T tokens, M hidden size, P features, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openling.model.ling import CallContext, Layer, Ling


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
    """Yield every hidden layer in order; the caller may change the student's layer before the walk runs through it.

    `windows` are batches of token ids [B, T] of one length. Forward passes run in BF16 autocast unless told otherwise.
    """
    ids = windows[0]
    teacher_call = CallContext(teacher.model.rope(ids, 0, None), None, None)
    student_call = CallContext(student.model.rope(ids, 0, None), None, None)
    teacher_h = [teacher.model.word_embeddings(w) for w in windows]
    student_h = [student.model.word_embeddings(w) for w in windows]
    for index in range(student.config.num_hidden_layers):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            layers = teacher.model.layers[index], student.model.layers[index]
            yield LayerStep(index, *layers, teacher_h, student_h, teacher_call, student_call)
            teacher_h = [layers[0](h, teacher_call) for h in teacher_h]
            student_h = [layers[1](h, student_call) for h in student_h]
