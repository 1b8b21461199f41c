"""Do the scores of `--layout selected` find the layer that is best left to MLA? Every layer of a teacher is tried in turn.

    python benchmarks/selection.py TEACHER --text CORPUS [--tokens N] [--rows R] [--length T]

TEACHER is a checkpoint folder, CORPUS what `openling data build` made. In turn each layer stays softmax attention, all others are
Lightning, and all mixers are trained after the teacher's logits on the same N tokens. Beside the scores that a migration can take
stands one that it cannot, `trained`: the KL that a layer's mixer, alone Lightning, leaves after STEPS steps. Writes
benchmarks/results/migration/selection.json: by layer the scores, and what was reached; and by score how far its choice is from
the best one.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import tempfile
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
from openling.migrate.pipeline import WINDOWS_PER_BATCH
from openling.migrate.select import LayerScore, select_layers
from openling.migrate.touched import trainable
from openling.model.device import pick_device
from openling.model.ling import Ling
from openling.train.loop import train

CALIBRATION_TOKENS, STEPS = 32768, 40
MUON = {"optimizer": "muon", "lr": 2e-3, "schedule": "cosine", "weight_decay": 0.0, "kl": 1.0, "ce": 0.0, "max_skips": 3}


def trained(
    teacher: Ling,
    mla_layers: tuple[int, ...],
    calibration: list[torch.Tensor],
    windows: np.ndarray,
    args: argparse.Namespace,
    **length: int,
) -> Ling:
    """The teacher with all layers but some as Lightning, and those trained for `tokens` or `steps`."""
    half = lightning_stage(teacher.config, {"mla_layers": mla_layers})
    how: dict[str, Any] = {"on_layer": lambda i: None, "bf16": args.bf16}
    converted, _ = to_lightning(teacher, half, calibration, Conversion(), seed=0, **how)
    student = copy.deepcopy(converted)  # the layers that stay are the teacher's own
    shape = {"batch_size": args.rows, "sequence_length": args.length, "warmup_steps": 10}
    alone = len(mla_layers) > 1
    names = trainable(student.config, "linear-warmup", "best" if alone else "attention")
    with tempfile.TemporaryDirectory() as run:
        batches = Batches(windows, batch_size=args.rows)
        config = TrainConfig(**length | shape | MUON)
        train(student, config, batches, parameters=names, run=Path(run), teacher=teacher, progress=not alone)
    return student.eval()


def main() -> None:
    """Scores, then layer by layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
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

    def measured(student: Ling) -> dict[str, dict[str, Any]]:
        return {name: dict(agreement(student, teacher, text, bf16=args.bf16)) for name, text in held_out.items()}

    def kl(found: dict[str, dict[str, Any]]) -> float:
        return float(np.mean([domain["kl"] for domain in found.values()]))

    scores: dict[str, tuple[float, ...]] = {}
    layers = range(config.num_hidden_layers)
    target = target_config(config, mla_layers=(0,))
    for score in get_args(LayerScore):
        options = Conversion(layer_score=score)
        scores[score] = select_layers(teacher, target, calibration, options, seed=0, bf16=args.bf16).scores
        print(score, [round(value, 4) for value in scores[score]], flush=True)
    others = [tuple(j for j in layers if j != i) for i in layers]
    scores["trained"] = tuple(kl(measured(trained(teacher, o, calibration, windows[count:], args, steps=STEPS))) for o in others)
    print("trained", [round(value, 4) for value in scores["trained"]], flush=True)
    rows: list[dict[str, Any]] = []
    reached: list[float] = []
    for layer in layers:
        student = trained(teacher, (layer,), calibration, windows[count:], args, tokens=args.tokens)
        found = measured(student)
        reached.append(kl(found))
        of_layer = {score: values[layer] for score, values in scores.items()}
        rows += [loss_row(f"layer {layer}, {name}", domain) | {"scores": of_layer} for name, domain in found.items()]
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
    write_results(args.results, shlex.join(["python", *sys.argv]).replace(str(args.teacher), "TEACHER"), rows)


if __name__ == "__main__":
    main()
