"""Our loop against the Trainer of transformers: the same GQA model, text, order and optimiser give the same curve."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from training_peer import curves  # noqa: E402

STEPS = 20


def test_the_curve_is_that_of_transformers_trainer(tmp_path: Path) -> None:
    ours, theirs = curves(STEPS, tmp_path)
    assert len(ours) == len(theirs) == STEPS
    # Both sum in FP32, in different orders: 2^-24 of each gradient, which AdamW's division by its own size passes on as 2^-24 of
    # a step, and training multiplies by some e per 10 steps at this rate: e^2 2^-24 = 4e-7. Ten times that is allowed, of norms,
    # which add up what all weights differ by, a hundred times.
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a["loss"] == pytest.approx(b["loss"], rel=4e-6), f"step {step}"
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=4e-5), f"step {step}"
    assert ours[-1]["loss"] < ours[0]["loss"] - 1.0
