"""Steps whose loss or gradient is not finite, or leaps: left out, with evidence kept; too many in a row end the run.

A step is bad where loss or gradient norm is not finite, where the norm exceeds `spike_norm` times the median of the last good
steps, or the loss that median by `spike_loss` nats. A bad step changes no weight, no optimiser state and no router bias; its
batch counts as read. What was judged is in every checkpoint, so a run that resumes judges alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from torch import nn

from openling.config.train import TrainConfig
from openling.data.batches import PackedBatch
from openling.errors import Failure
from openling.weights.whole import write_json

WINDOW = 64
# Medians of fewer steps say little, and the first steps of a warm-up fall fast.
ENOUGH = 16
# A batch of more tokens is told by its number alone, from which the same data make it again.
MOST_IDS = 1 << 20


class Guard:
    """Judges each step by the ones before it."""

    def __init__(self, run: Path, config: TrainConfig, rank: int = 0) -> None:
        """rank: others than 0 keep evidence of their own rows and parts of gradients."""
        self.folder, self.config, self.rank = run / "evidence", config, rank
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0

    def verdict(self, loss: float, norm: float) -> str | None:
        """Why this step must be left out, or None."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "the loss or a gradient is not finite"
        c = self.config
        if len(self.norms) >= ENOUGH:
            usual = statistics.median(self.norms)
            if c.spike_norm is not None and norm > c.spike_norm * usual:
                return f"the gradient norm {norm:.3g} is more than {c.spike_norm:g} times the recent {usual:.3g}"
            usual = statistics.median(self.losses)
            if c.spike_loss is not None and loss > usual + c.spike_loss:
                return f"the loss {loss:.4f} is more than {c.spike_loss:g} above the recent {usual:.4f}"
        return None

    def good(self, loss: float, norm: float) -> None:
        """Remember a step that was taken."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.in_a_row = 0

    def bad(self, why: str, row: dict[str, Any], batch: PackedBatch, parameters: dict[str, nn.Parameter]) -> None:
        """Keep batch and gradient norms of a step that is left out; a `Failure` when it is one too many."""
        self.in_a_row += 1
        norms = {name: float(p.grad.float().norm()) for name, p in parameters.items() if p.grad is not None}
        evidence = {
            "why": why,
            "metrics": {name: str(value) for name, value in row.items()},
            "gradients_not_finite": [name for name, norm in norms.items() if not math.isfinite(norm)],
            "gradient_norms": {name: str(norm) for name, norm in norms.items()},
            "batch": row["step"] - 1,
            "documents": batch.cu_seqlens.tolist(),
            "input_ids": batch.ids.tolist() if batch.ids.numel() <= MOST_IDS else None,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{row['step']}{f'_rank_{self.rank}' if self.rank else ''}.json"
        write_json(path, evidence)
        if self.in_a_row > self.config.max_skips:
            skipped = f", after {self.in_a_row - 1} that were left out" if self.in_a_row > 1 else ""
            raise Failure(
                f"{why} at step {row['step']}{skipped}",
                where=path,
                value=f"loss {row['loss']}, gradient norm {row['grad_norm']}",
                expected=f"finite numbers without leaps, or at most {self.config.max_skips} bad steps in a row (max_skips)",
                next="a new run with a lower learning rate or precision fp32; or --resume with a larger max_skips",
            )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": list(self.losses), "norms": list(self.norms), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        self.in_a_row = state["in_a_row"]
