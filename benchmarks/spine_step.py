"""The demo's training step now and at the spine's last commit: SmolLM2-135M's shape, linear warm-up with teacher, on a CPU.

    python benchmarks/spine_step.py [ROUNDS]

Both run alternately, each round in a process of its own, so that a machine that slows down does so for both. Weights are
random: the time of a step does not depend on them. Writes benchmarks/results/kernels/spine-step.json.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

SPINE = "9d5ad5b"
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/kernels/spine-step.json"
STEPS, GOAL = 6, 1.5


def main() -> None:
    """Measure alternately, write the result."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    taken: dict[str, list[float]] = {"spine": [], "now": []}
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", SPINE, "src"], capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        for _ in range(rounds):
            for name, source in (("spine", Path(folder) / "src"), ("now", ROOT / "src")):
                taken[name] += _steps(source)
    from openling.environment import write_results

    now, spine = (median(taken[name]) for name in ("now", "spine"))
    row = {"name": "training step of the demo's linear warm-up, B2 x T512", "value": now, "unit": "s", "peer": f"commit {SPINE}"}
    judged = {"peer_value": spine, "ratio": spine / now, "goal": f"≥ {GOAL:g}x peer", "met": spine / now >= GOAL, "rounds": taken}
    write_results(RESULTS, shlex.join(["python", *sys.argv]), [row | judged])
    print(RESULTS.read_text())


def _steps(source: Path) -> list[float]:
    """Seconds of every step but the first two, which also warm up the allocator."""
    command = [sys.executable, __file__, "--in", str(source)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(x) for x in re.findall(r"^step (\S+)$", printed, re.MULTILINE)][2:]


def child(source: str) -> None:
    """Train with the package in `source` and print how long each step took."""
    sys.path.insert(0, source)
    import numpy as np
    import torch

    import openling
    from openling.config.train import TrainConfig
    from openling.data.pack import Batches
    from openling.migrate.pipeline import trainable
    from openling.model.config import ModelConfig
    from openling.model.ling import Ling
    from openling.train.loop import train

    assert str(openling.__file__).startswith(source), openling.__file__

    def model(kinds: list[Any], **options: Any) -> Ling:
        config = ModelConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, head_dim=64, tie_word_embeddings=True, layer_kinds=tuple(kinds), **options,
        )  # fmt: skip
        made = Ling(config)
        made.init_weights(torch.Generator().manual_seed(0))
        return made.eval()

    teacher = model(["gqa"] * 30, use_qk_norm=False)
    student = model((["lightning"] * 5 + ["gqa"]) * 5)
    config = TrainConfig(steps=STEPS, batch_size=2, lr=2e-4, weight_decay=0.0, ce=0.0, kl=1.0, schedule="cosine")
    windows = np.random.default_rng(1).integers(49152, size=(32, config.sequence_length))
    batches = Batches(windows, batch_size=2, seed=0)
    choice = trainable(student.config, "linear-warmup", "best")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(student, config, batches, parameters=choice, run=run, teacher=teacher, progress=False)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        print("step", 2 * config.sequence_length / row["tokens_per_s"])


if __name__ == "__main__":
    child(sys.argv[2]) if sys.argv[1:2] == ["--in"] else main()
