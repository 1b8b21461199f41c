"""Whole migrations of one teacher, arm by arm: how far each gets in how many tokens, on the same text in the same order.

    python benchmarks/migration.py TEACHER WORK ARM --text CORPUS [--tokens N] [--seed S] [-- FLAGS OF openling migrate]

TEACHER is a checkpoint folder, CORPUS what `openling data build` made of `benchmarks/fetch_text.py`'s files, N the tokens of each
warm-up. Arms: those of `MIGRATED`, which are `openling migrate` with some flags; `continued`, the teacher trained further on
the same 2 N tokens (what any student could at most reach); `scratch`, the hybrid from random weights. A run that was stopped goes
on with the same command. Writes benchmarks/results/migration/TEACHER-ARM-SEED.json: losses, gaps and KL after each stage by
domain, recall, and the training curve (cross-entropy of text before it is learned from) at tokens spaced by a fifth of a decade.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import openling
from openling.cli import main as command_line
from openling.config.train import TrainConfig
from openling.data.corpus import find_corpus
from openling.data.dataset import scattered_tokens
from openling.data.pack import Batches, cut_windows, tokenise
from openling.environment import write_results
from openling.migrate.layout import target_config
from openling.migrate.measure import agreement
from openling.model.device import pick_device
from openling.model.ling import Ling
from openling.train.loop import train

RESULTS = Path(__file__).parent / "results" / "migration"
LENGTH, ROWS, EVALUATION_TOKENS = 1024, 64, 65536
DOMAINS = ("python-docs", "kjv")
SCHEDULE = {"batch_size": ROWS, "sequence_length": LENGTH, "warmup_steps": 50, "checkpoint_seconds": 240}
CROSS_ENTROPY = [f"--{w}.train.{k}={v}" for w in ("linear_warmup", "mla_warmup") for k, v in (("ce", 1), ("kl", 0))]
MIGRATED: dict[str, list[str]] = {
    "best": [],
    "paper": ["--preset", "paper"],
    "best-without-kl": CROSS_ENTROPY,
    "best-all-mixers": ["--linear_warmup.trainable", "attention", "--mla_warmup.trainable", "attention"],
    "selected": ["--layout", "selected"],
    "pure-linear": ["--layout", "none"],
    "groups-of-2": ["--group-size", "2"],
    "groups-of-3": ["--group-size", "3"],
    "groups-of-15": ["--group-size", "15"],
}
TRAINED = {"continued": 1e-4, "scratch": 1e-3}  # learning rates


def curve(rows: list[dict[str, Any]], before: int) -> list[dict[str, float]]:
    """Means of the cross-entropy between marks that are a fifth of a decade apart; tokens count from the run's start."""
    marks = np.unique(np.geomspace(rows[0]["tokens"], rows[-1]["tokens"], max(2, round(5 * np.log10(len(rows) + 1)))).astype(int))
    found, at = [], 0
    for mark in marks:
        part = [r for r in rows[at:] if r["tokens"] <= mark]
        if part:
            at += len(part)
            kl = [r["kl"] for r in part if r.get("kl") is not None]
            row = {"tokens": before + part[-1]["tokens"], "ce": float(np.mean([r["ce"] for r in part]))}
            found.append(row | ({"kl": float(np.mean(kl))} if kl else {}))
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of one training run."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def migrated(args: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Run the migration, or what is left of it; its stages as rows."""
    run = out.with_name(out.name + ".run")
    flags = ["--tokens", str(args.tokens), "--device", args.device, "--seed", str(args.seed), "--gates.stop", "false"]
    flags += ["--text", *args.text, "--text.sequence_length", str(LENGTH), "--text.evaluation_tokens", str(EVALUATION_TOKENS)]
    for warmup in ("linear_warmup", "mla_warmup"):
        fields = SCHEDULE | {"seed": args.seed}
        flags += [word for name, value in fields.items() for word in (f"--{warmup}.train.{name}", str(value))]
    words = ["migrate", str(args.teacher), str(out), *flags, *MIGRATED[args.arm], *args.flags]
    if code := command_line([*words, "--resume"] if run.exists() else words):
        raise SystemExit(code)
    report = json.loads((run / "report.json").read_text())
    rows, tokens = [], 0
    for stage in report["stages"]:
        rows += [
            loss_row(f"{stage['name']}, {domain}", found, stage.get("seconds")) for domain, found in stage["domains"].items()
        ]
        if stage["needle"]:
            mean = float(np.mean([case["exact"] for case in stage["needle"]]))
            rows.append({"name": f"{stage['name']}, needle recall", "value": mean, "unit": "share", "cases": stage["needle"]})
        if stage.get("metrics"):
            steps = read_metrics(run / stage["metrics"])
            rows.append({"name": f"{stage['name']}, curve", "value": len(steps), "unit": "steps", "curve": curve(steps, tokens)})
            tokens += steps[-1]["tokens"]
    return rows


def trained(args: argparse.Namespace, run: Path) -> list[dict[str, Any]]:
    """The teacher, or the hybrid from random weights, on the text of both warm-ups."""
    device = pick_device(args.device)
    loaded = openling.load(args.teacher, device=device)
    teacher, tokenizer = loaded.model.float(), loaded.tokenizer
    model = openling.load(args.teacher, device=device).model.float()
    if args.arm == "scratch":
        with device:
            model = Ling(target_config(loaded.config))
        model.init_weights(torch.Generator(device).manual_seed(args.seed))
    tokens = scattered_tokens(args.text, tokenizer, vocab_size=loaded.config.vocab_size, max_tokens=2 * args.tokens)
    config = TrainConfig(
        **SCHEDULE
        | {"tokens": 2 * args.tokens, "lr": TRAINED[args.arm], "schedule": "cosine", "weight_decay": 0.0, "seed": args.seed}
    )
    batches = Batches(cut_windows(tokens, LENGTH), batch_size=ROWS, seed=args.seed)
    train(model, config, batches, parameters=[""], run=run, resume=(run / "train.json").exists())
    rows = []
    for name in DOMAINS:
        documents = find_corpus(name).documents()
        text = tokenise(documents, tokenizer, vocab_size=loaded.config.vocab_size, max_tokens=EVALUATION_TOKENS)
        windows = torch.from_numpy(cut_windows(text, LENGTH).astype(np.int64))
        rows.append(loss_row(f"{args.arm}, {name}", dict(agreement(model.eval(), teacher.eval(), windows, bf16=True))))
    steps = read_metrics(run / "metrics.jsonl")
    return [*rows, {"name": f"{args.arm}, curve", "value": len(steps), "unit": "steps", "curve": curve(steps, 0)}]


def loss_row(name: str, found: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
    """A model beside the teacher on one domain."""
    kept = {key: found[key] for key in ("gap", "gap_stderr", "kl", "top1")}
    teacher = {"peer": "teacher", "peer_value": found["teacher_loss"]}
    return {"name": name, "value": found["loss"], "unit": "nats per token", **teacher, "seconds": seconds, **kept}


def main() -> None:
    """One arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("arm", choices=[*MIGRATED, *TRAINED])
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:split])
    args.flags = words[split + 1 :]
    args.work.mkdir(parents=True, exist_ok=True)
    out = args.work / f"{args.arm}-{args.seed}"
    rows = migrated(args, out) if args.arm in MIGRATED else trained(args, out)
    said = shlex.join(["python", *sys.argv]).replace(str(args.work), "WORK")
    path = RESULTS / f"{args.teacher.name.lower()}-{args.arm}-{args.seed}.json"
    write_results(path, said, rows)
    for row in rows:
        print(f"{row['name']}: {row['value']:.3f} {row['unit']}")


if __name__ == "__main__":
    main()
