"""Everything that is measured after a stage, always the same way: the teacher's side is computed once per run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from openling.data.needle import make_needle
from openling.errors import UserError
from openling.migrate.gates import broken_tensors
from openling.migrate.measure import TeacherTrace, agreement, layer_errors, needle_recall, sample_completions
from openling.model.ling import Ling

PROMPTS = (
    "The capital of France is",
    "To make a cup of tea, first",
    "def is_prime(n):\n",
)
NEEDLE_LENGTHS = (128, 256, 512)
NEEDLE_DEPTHS = (0.1, 0.5, 0.9)
NEEDLE_SAMPLES = 2
# Per-layer errors need far fewer tokens than a loss: every token counts with all of its channels.
LAYER_WINDOWS = 4


class Measurer:
    """Measures students against one teacher on fixed windows of held-out text.

    windows: int32 [N, T] by domain; the last domain is the one no calibration text comes from.
    """

    def __init__(self, teacher: Ling, tokenizer: Any, windows: dict[str, np.ndarray], *, bf16: bool) -> None:
        self.teacher, self.tokenizer, self.bf16 = teacher, tokenizer, bf16
        self.windows = {name: torch.from_numpy(w.astype(np.int64)) for name, w in windows.items()}
        self.traces = {name: TeacherTrace.record(teacher, w, bf16=bf16) for name, w in self.windows.items()}

    def stage(self, student: Ling) -> dict[str, Any]:
        """Agreement by domain, errors by layer, needle recall, samples: the measured part of a report's stage."""
        last = list(self.windows.values())[-1]
        same = student is self.teacher
        return {
            "domains": self.domains(student),
            "layers": [] if same else layer_errors(student, self.teacher, last[:LAYER_WINDOWS], bf16=self.bf16),
            "needle": self._recall(student, last.flatten().tolist()),
            "samples": sample_completions(student, self.tokenizer, PROMPTS, max_new_tokens=40),
            "nonfinite": broken_tensors(student),
        }

    def domains(self, student: Ling) -> dict[str, Any]:
        """Agreement with the teacher on each domain."""
        return {name: agreement(student, self.traces[name], w, bf16=self.bf16) for name, w in self.windows.items()}

    def _recall(self, student: Ling, filler: list[int]) -> list[dict[str, Any]]:
        """Recall at the lengths that the filler text is long enough for and the model was trained to."""
        lengths = [n for n in NEEDLE_LENGTHS if n <= min(len(filler), student.config.max_position_embeddings)]
        try:
            make_needle(self.tokenizer, filler, length=lengths[0], depth=0.5, seed=0)
        except (UserError, IndexError):
            return []  # a tokenizer so coarse, or a text so short, that no needle fits: the report says "not run"
        rows = needle_recall(
            student, self.tokenizer, filler, lengths=lengths, depths=NEEDLE_DEPTHS, samples=NEEDLE_SAMPLES, bf16=self.bf16
        )
        return [dict(row) for row in rows]

    @staticmethod
    def line(stage: dict[str, Any]) -> str:
        """One line for the terminal: name, then loss and gap by domain."""
        parts = [f"{name} {d['loss']:.3f} nats ({d['gap']:+.3f}), top-1 {d['top1']:.0%}" for name, d in stage["domains"].items()]
        return f"  {stage['name']}: " + "; ".join(parts) + f"  [{stage['seconds']:.0f} s]"
