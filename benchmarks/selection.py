"""Do the scores of `--layout selected` find the layer that is best left to MLA? Every layer of a teacher is tried in turn.

    python benchmarks/selection.py TEACHER WORK --text CORPUS [--tokens N] [--rows R] [--length T]

TEACHER is a checkpoint folder, CORPUS what `openling data build` made. In turn each layer stays softmax attention, all others are
Lightning, and all mixers are trained after the teacher's logits on the same N tokens. Writes
benchmarks/results/migration/selection.json: by layer the scores, and what was reached; and by score how far its choice is from
the best one.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from migration import RESULTS, domain_windows, loss_row, recall_rows, release_memory

import openling
from openling.config.migrate import Conversion
from openling.config.train import TrainConfig
from openling.data.dataset import scattered_tokens
from openling.data.pack import Batches, cut_windows
from openling.environment import write_results
from openling.migrate.convert import to_lightning
from openling.migrate.layout import lightning_stage, target_config
from openling.migrate.measure import agreement
from openling.migrate.select import LayerScore, select_layers
from openling.migrate.touched import trainable
from openling.model.device import pick_device
from openling.model.ling import Ling
from openling.train.loop import train

CALIBRATION_TOKENS, WINDOWS_PER_BATCH = 32768, 8
MUON = {"optimizer": "muon", "lr": 2e-3, "schedule": "cosine", "weight_decay": 0.0, "kl": 1.0, "ce": 0.0, "max_skips": 3}


def kept(teacher: Ling, layer: int, calibration: list[torch.Tensor], windows: np.ndarray, args: argparse.Namespace) -> Ling:
    """The teacher with all layers but one as Lightning, trained."""
    half = lightning_stage(teacher.config, {"mla_layers": (layer,)})
    how: dict[str, Any] = {"on_layer": lambda i: None, "bf16": args.bf16}
    student, _ = to_lightning(teacher, half, calibration, Conversion(), seed=0, **how)
    shape = {"tokens": args.tokens, "batch_size": args.rows, "sequence_length": args.length, "warmup_steps": 10}
    batches = Batches(windows, batch_size=args.rows)
    names = trainable(student.config, "linear-warmup", "attention")
    run = args.work / f"layer-{layer}"
    train(student, TrainConfig(**shape | MUON), batches, parameters=names, run=run, teacher=teacher)
    return student.eval()


def main() -> None:
    """Scores, then layer by layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=6_000_000)
    parser.add_argument("--rows", type=int, default=16, help="windows of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--results", type=Path, default=RESULTS / "selection.json")
    args = parser.parse_args()
    device = pick_device("auto")
    args.bf16 = device.type == "cuda"
    loaded = openling.load(args.teacher, device=device)
    teacher, config = loaded.model.float().eval(), loaded.config
    held_out = domain_windows(loaded.tokenizer, config.vocab_size, args.length)
    tokens = scattered_tokens(
        args.text, loaded.tokenizer, vocab_size=config.vocab_size, max_tokens=CALIBRATION_TOKENS + args.tokens
    )
    windows = cut_windows(tokens, args.length)
    count = CALIBRATION_TOKENS // args.length
    calibration = list(torch.from_numpy(windows[:count].astype(np.int64)).to(device).split(WINDOWS_PER_BATCH))

    scores: dict[LayerScore, tuple[float, ...]] = {}
    target = target_config(config, mla_layers=(0,))
    for score in get_args(LayerScore):
        options = Conversion(layer_score=score)
        scores[score] = select_layers(teacher, target, calibration, options, seed=0, bf16=args.bf16).scores
        print(score, [round(value, 4) for value in scores[score]], flush=True)
    rows: list[dict[str, Any]] = []
    reached: list[float] = []  # KL, mean over the domains
    for layer in range(config.num_hidden_layers):
        student = kept(teacher, layer, calibration, windows[count:], args)
        found = {name: dict(agreement(student, teacher, text, bf16=args.bf16)) for name, text in held_out.items()}
        reached.append(float(np.mean([measured["kl"] for measured in found.values()])))
        of_layer = {score: values[layer] for score, values in scores.items()}
        rows += [loss_row(f"layer {layer}, {name}", measured) | {"scores": of_layer} for name, measured in found.items()]
        rows += recall_rows(f"layer {layer}", student, loaded.tokenizer, held_out, args.length)
        print(f"layer {layer}: KL {reached[-1]:.4f}, recall {rows[-1]['value']:.2f}", flush=True)
        del student
        release_memory()
    for score, values in scores.items():
        choice = int(np.argmax(values))
        more = {"peer": f"layer {int(np.argmin(reached))}", "peer_value": min(reached), "layer": choice}
        rows.append(
            {"name": f"layer chosen by {score}: {choice}", "value": reached[choice], "unit": "KL, nats per token", **more}
        )
        print(f"{rows[-1]['name']}: KL {reached[choice]:.4f}, best {min(reached):.4f}")
    write_results(args.results, shlex.join(["python", *sys.argv]).replace(str(args.work), "WORK"), rows)


if __name__ == "__main__":
    main()
