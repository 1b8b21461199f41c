"""Everything that is measured after a stage, always the same way: the teacher's side is computed once per run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from openling.config.migrate import Recall
from openling.migrate.gates import broken_tensors, needles_found
from openling.migrate.measure import (
    LayerMeasures,
    TeacherTrace,
    agreement,
    layer_measures,
    needle_fits,
    needle_recall,
    sample_completions,
)
from openling.model.ling import Ling

PROMPTS = (
    "The capital of France is",
    "To make a cup of tea, first",
    "def is_prime(n):\n",
)
# Per-layer errors need far fewer tokens than a loss: every token counts with all of its channels.
LAYER_WINDOWS = 4


class Measurer:
    """Measures students against one teacher on fixed windows of held-out text.

    windows: int32 [N, T] by domain; the last domain is the one no calibration text comes from.
    """

    def __init__(self, teacher: Ling, tokenizer: Any, windows: dict[str, np.ndarray], *, recall: Recall, bf16: bool) -> None:
        self.teacher, self.tokenizer, self.recall, self.bf16 = teacher, tokenizer, recall, bf16
        self.windows = {name: torch.from_numpy(w.astype(np.int64)) for name, w in windows.items()}
        self.traces = {name: TeacherTrace.record(teacher, w, bf16=bf16) for name, w in self.windows.items()}

    def stage(self, student: Ling, *, walk: bool = True) -> dict[str, Any]:
        """Agreement by domain, errors and router drift by layer, recall, samples: the measured part of a report's stage.

        walk: without, no layer is looked at.
        """
        last = list(self.windows.values())[-1]
        layers = LayerMeasures([], [])
        if walk and student is not self.teacher:
            layers = layer_measures(student, self.teacher, last[:LAYER_WINDOWS], bf16=self.bf16)
        filler = last.flatten().tolist()
        lengths, keys = self._lengths(student, filler), self.recall.keys
        among = self._lengths(student, filler, keys) if keys > 1 else []
        return {
            "domains": self.domains(student),
            "layers": layers.errors,
            "routers": layers.routers,
            "needle": self._needle(student, filler, lengths),
            "needle_left_out": [length for length in self.recall.lengths if length not in lengths],
            "needle_keys": keys,
            "needle_among": self._needle(student, filler, among, keys),
            "samples": sample_completions(student, self.tokenizer, PROMPTS, max_new_tokens=40),
            "nonfinite": broken_tensors(student),
        }

    def domains(self, student: Ling) -> dict[str, Any]:
        """Agreement with the teacher on each domain."""
        return {name: agreement(student, self.traces[name], w, bf16=self.bf16) for name, w in self.windows.items()}

    def _lengths(self, student: Ling, filler: list[int], keys: int = 1) -> list[int]:
        """The lengths that the model was trained to, the held-out text suffices for, and facts with their question fit into."""
        longest = min(len(filler), student.config.max_position_embeddings)
        possible = [length for length in self.recall.lengths if length <= longest]
        return [length for length in possible if needle_fits(self.tokenizer, filler, length, keys=keys)]

    def _needle(self, student: Ling, filler: list[int], lengths: list[int], keys: int = 1) -> list[dict[str, Any]]:
        asked: dict[str, Any] = {"lengths": lengths, "depths": self.recall.depths, "samples": self.recall.samples, "keys": keys}
        return [dict(row) for row in needle_recall(student, self.tokenizer, filler, **asked, bf16=self.bf16)]

    @staticmethod
    def line(stage: dict[str, Any]) -> str:
        """One line for the terminal: name, then loss and gap by domain, then needles found."""
        parts = [f"{name} {d['loss']:.3f} nats ({d['gap']:+.3f}), top-1 {d['top1']:.0%}" for name, d in stage["domains"].items()]
        for keys, rows in ((1, stage["needle"]), (stage["needle_keys"], stage["needle_among"])):
            if rows:
                parts.append(f"needles, 1 of {keys}: {needles_found(rows)} of {sum(row['n'] for row in rows)}")
        return f"  {stage['name']}: " + "; ".join(parts) + f"  [{stage['seconds']:.0f} s]"
