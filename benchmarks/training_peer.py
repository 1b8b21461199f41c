"""Our loop against the Trainer of transformers: the same GQA model, text, order and optimiser; both curves, step by step.

    python benchmarks/training_peer.py [STEPS]

A small dense model with two query heads per key head in FP32 on a CPU, AdamW, two accumulated parts a step. Writes
benchmarks/results/training/against-trainer.json. `tests/train/test_against_trainer.py` holds a shorter run to FP32's rounding.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import openling
from openling.config.train import TrainConfig
from openling.data.byte_tokenizer import byte_tokenizer
from openling.data.corpus import mixture
from openling.data.pack import Batches, cut_windows, tokenise
from openling.environment import write_results
from openling.train.loop import train

RESULTS = Path(__file__).parent / "results" / "training" / "against-trainer.json"
ROWS, PARTS, LENGTH, RATE, DECAY = 8, 2, 64, 3e-3, 0.1
Curve = list[dict[str, float]]


def curves(steps: int, folder: Path) -> tuple[Curve, Curve]:
    """Loss and gradient norm of every step: ours, and that of transformers."""
    start = folder / "start"
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, max_position_embeddings=LENGTH)).save_pretrained(start)
    text = tokenise(mixture(("kjv",)), byte_tokenizer(), vocab_size=320, max_tokens=steps * ROWS * LENGTH)
    rows = cut_windows(text, LENGTH, at_least=steps * ROWS)
    return _ours(start, rows, folder / "ours", steps), _theirs(start, rows, folder / "theirs", steps)


def _theirs(start: Path, rows: np.ndarray, out: Path, steps: int) -> Curve:
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=ROWS // PARTS, gradient_accumulation_steps=PARTS,
        learning_rate=RATE, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, weight_decay=DECAY, max_grad_norm=1.0,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, train_sampling_strategy="sequential", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in torch.from_numpy(rows.astype(np.int64))]
    trainer = Trainer(model=LlamaForCausalLM.from_pretrained(start), args=arguments, train_dataset=data)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def _ours(start: Path, rows: np.ndarray, run: Path, steps: int) -> Curve:
    config = TrainConfig(
        steps=steps, batch_size=ROWS, accumulation=PARTS, sequence_length=LENGTH, lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY,
        clip=1.0, precision="fp32", checkpoint_seconds=None,
    )  # fmt: skip
    train(openling.load(start).model, config, InOrder(rows, batch_size=ROWS), parameters=[""], run=run, progress=False)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class InOrder(Batches):
    """The windows one after the other."""

    def _window(self, draw: int) -> int:
        return draw % len(self.windows)


def main() -> None:
    """Both curves, and how far they are apart."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = curves(steps, Path(folder))
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)]
    # A step sees 512 bytes: what one step's loss differs from its neighbours by is the noise of the curve.
    losses = np.array([a["loss"] for a in ours[-100:]])
    noise = float(np.std(np.diff(losses)) / 2**0.5)
    line = {
        "name": f"largest distance of the two loss curves over {steps} steps", "value": max(apart), "unit": "nats",
        "peer": "transformers Trainer", "goal": "below the noise of one step", "met": max(apart) < noise, "noise": noise,
        "ours": [a["loss"] for a in ours[:: max(1, steps // 20)]], "theirs": [b["loss"] for b in theirs[:: max(1, steps // 20)]],
    }  # fmt: skip
    print(json.dumps(line, indent=1))
    write_results(RESULTS, shlex.join(["python", *sys.argv]), [line])


if __name__ == "__main__":
    main()
