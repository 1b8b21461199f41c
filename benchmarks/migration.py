"""Whole migrations of one teacher, arm by arm: how far each gets in how many tokens, on the same text in the same order.

    python benchmarks/migration.py TEACHER WORK ARM ... --text CORPUS [--tokens N] [--seed S] [-- FLAGS OF openling migrate]

TEACHER is a checkpoint folder, CORPUS what `openling data build` made of `benchmarks/fetch_text.py`'s files (for a teacher of
`moe_teacher.py`, the corpus that it built), N the tokens of each warm-up. Arms: those of `MIGRATED`, which are `openling
migrate` with some flags; `continued`, the teacher trained further on the same 2 N tokens (what any student could at most
reach); `scratch`, the hybrid from random weights; `trained-on`, all of what the arm `--after` left in WORK, on the 2 N tokens
behind the `--seen` ones of the corpus (where it ends, on its beginning again), as Ling-2.6 went on after its migration, and
`trained-on-kl`, the same after the teacher's logits instead of the text (their peer is `continued` on as many tokens in all);
`trained-on-corrected`, after the logits of the teacher that `continued` left in WORK ("teacher correction", arXiv 2408.11796).
Arms run in turn; one whose results are there is left out, and one that was stopped goes on with the same command. Each writes
benchmarks/results/migration/TEACHER-ARM-SEED.json: losses, gaps and KL after each stage by domain, drift of routers, recall of
one fact among one or several beside the teacher's, and the training curve at tokens spaced by a fifth of a decade: each step's
cross-entropy before the step; past the corpus' end the text has been learned from before.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import openling
from openling.cli import main as command_line
from openling.config.migrate import Text
from openling.config.train import TrainConfig
from openling.data.dataset import scattered_tokens
from openling.data.pack import Batches, cut_windows
from openling.environment import write_results
from openling.migrate.layout import target_config
from openling.migrate.measure import agreement, needle_fits, needle_recall
from openling.migrate.texts import evaluation_windows
from openling.model.device import pick_device
from openling.model.ling import Ling
from openling.train.checkpoint import latest_checkpoint, load_start
from openling.train.loop import train

RESULTS = Path(__file__).parent / "results" / "migration"
EVALUATION_TOKENS = 65536
DOMAINS = ("python-docs", "kjv")
SCHEDULE = {"warmup_steps": 50, "checkpoint_seconds": 240}
# Facts in a text that one of them is asked from; at depths, with cases each.
KEYS, DEPTHS, CASES = (1, 4, 8), (0.1, 0.3, 0.5, 0.7, 0.9), 20
CROSS_ENTROPY = [f"--{w}.train.{k}={v}" for w in ("linear_warmup", "mla_warmup") for k, v in (("ce", 1), ("kl", 0))]
MIGRATED: dict[str, list[str]] = {
    "best": [],
    "paper": ["--preset", "paper"],
    "best-without-kl": CROSS_ENTROPY,
    "best-all-mixers": ["--linear_warmup.trainable", "attention", "--mla_warmup.trainable", "attention"],
    "selected": ["--layout", "selected"],
    "pure-linear": ["--layout", "none"],
    "groups-of-2": ["--group-size", "2"],
    "groups-of-4": ["--group-size", "4"],
    "groups-of-3": ["--group-size", "3"],
    "groups-of-15": ["--group-size", "15"],
}
TRAINED_ON: dict[str, Any] = {"lr": 1e-3, "optimizer": "muon", "max_skips": 3}
# A model that is trained from random weights needs its routers balanced; of others they stay as they are.
TRAINED: dict[str, dict[str, Any]] = {
    "continued": {"lr": 1e-4},
    "scratch": {"lr": 1e-3, "bias_rate": 1e-2},
    "trained-on": TRAINED_ON,
    "trained-on-kl": TRAINED_ON | {"kl": 1.0, "ce": 0.0},
    "trained-on-corrected": TRAINED_ON | {"kl": 1.0, "ce": 0.0},
}


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


def lengths(length: int) -> list[int]:
    """Of the texts that facts are recalled from: in the context that is trained."""
    return [length // 4, length // 2, length]


def domain_windows(tokenizer: Any, vocab_size: int, length: int) -> dict[str, torch.Tensor]:
    """Held-out text by domain, as `openling migrate` measures it beside a built corpus, [N, length]."""
    text = Text(evaluation=DOMAINS, calibration=DOMAINS, sequence_length=length, evaluation_tokens=EVALUATION_TOKENS)
    windows = evaluation_windows(text, tokenizer, vocab_size=vocab_size)
    return {name: torch.from_numpy(found.astype(np.int64)) for name, found in windows.items()}


def recall_rows(label: str, model: Ling, tokenizer: Any, windows: dict[str, torch.Tensor], length: int) -> list[dict[str, Any]]:
    """Recall of a fact among `KEYS`, inside the text of each domain."""
    bf16, rows = model.lm_head.weight.is_cuda, []
    for keys in KEYS:
        cases: list[dict[str, Any]] = []
        for name, text in windows.items():
            filler = text.flatten().tolist()
            fitting = [n for n in lengths(length) if needle_fits(tokenizer, filler, n, keys=keys)]
            found = needle_recall(model, tokenizer, filler, lengths=fitting, depths=DEPTHS, samples=CASES, keys=keys, bf16=bf16)
            cases += [{"domain": name, **case} for case in found]
        if cases:
            mean = float(np.mean([case["exact"] for case in cases]))
            rows.append({"name": f"{label}, recall of 1 of {keys}", "value": mean, "unit": "share", "keys": keys, "cases": cases})
    return rows


def migrated(args: argparse.Namespace, arm: str, out: Path) -> list[dict[str, Any]]:
    """Run the migration, or what is left of it; its stages as rows."""
    run = out.with_name(out.name + ".run")
    flags = ["--tokens", str(args.tokens), "--device", args.device, "--seed", str(args.seed), "--gates.stop", "false"]
    texts = {"sequence_length": args.length, "evaluation_tokens": EVALUATION_TOKENS}
    flags += ["--text", *args.text, *(word for name, value in texts.items() for word in (f"--text.{name}", str(value)))]
    flags += ["--eval-text", *DOMAINS]
    flags += ["--recall.lengths", ",".join(map(str, lengths(args.length))), "--recall.samples", str(CASES)]
    for warmup in ("linear_warmup", "mla_warmup"):
        fields = SCHEDULE | {"batch_size": args.rows, "sequence_length": args.length, "seed": args.seed}
        flags += [word for name, value in fields.items() for word in (f"--{warmup}.train.{name}", str(value))]
    words = ["migrate", str(args.teacher), str(out), *flags, *MIGRATED[arm], *args.flags]
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
        if drift := stage["routers"]:
            kept = float(np.mean([layer["kept"] for layer in drift]))
            rows.append({"name": f"{stage['name']}, experts kept", "value": kept, "unit": "share", "layers": drift})
        if stage.get("metrics"):
            steps = read_metrics(run / stage["metrics"])
            rows.append({"name": f"{stage['name']}, curve", "value": len(steps), "unit": "steps", "curve": curve(steps, tokens)})
            tokens += steps[-1]["tokens"]
    device = pick_device(args.device)
    loaded, teacher = (openling.load(folder, device=device) for folder in (out, args.teacher))
    return [*rows, *compared_recall(arm, loaded.model.float(), teacher.model.float(), loaded.tokenizer, args.length)]


def trained(args: argparse.Namespace, arm: str, run: Path) -> list[dict[str, Any]]:
    """The teacher, or the hybrid from random weights, on the text of both warm-ups; or a hybrid on what comes after it."""
    device = pick_device(args.device)
    loaded = openling.load(args.teacher, device=device)
    teacher, tokenizer = loaded.model.float(), loaded.tokenizer
    held_out = domain_windows(tokenizer, loaded.config.vocab_size, args.length)  # what is missing is missed before the training
    after = arm.startswith("trained-on")
    followed = corrected(args, device) if arm == "trained-on-corrected" else teacher
    begin = args.work / f"{args.after}-{args.seed}" if after else args.teacher
    model = openling.load(begin, device=device).model.float()
    if arm == "scratch":
        with device:
            model = Ling(target_config(loaded.config))
        model.init_weights(torch.Generator(device).manual_seed(args.seed))
    fields = {"tokens": 2 * args.tokens, "batch_size": args.rows, "sequence_length": args.length, "seed": args.seed}
    rate = {"lr": args.rate} if after else {}
    config = TrainConfig(**SCHEDULE | fields | {"schedule": "cosine", "weight_decay": 0.0} | TRAINED[arm] | rate)
    seen = (2 * args.tokens if args.seen is None else args.seen) if after else 0
    tokens = scattered_tokens(args.text, tokenizer, vocab_size=loaded.config.vocab_size, max_tokens=seen + 2 * args.tokens)
    unseen_first = np.concatenate([tokens[seen:], tokens[:seen]])[: 2 * args.tokens]  # a corpus may end before
    batches = Batches(cut_windows(unseen_first, args.length), batch_size=args.rows, seed=args.seed)
    go_on = (run / "train.json").exists()
    ended = train(model, config, batches, parameters=[""], run=run, resume=go_on, teacher=followed if config.kl else None)
    if ended.stopped != "finished":
        raise SystemExit(f"{arm}: stopped after step {ended.steps}; the same command goes on")
    rows, bf16 = [], device.type == "cuda"
    for name, windows in held_out.items():
        rows.append(loss_row(f"{arm}, {name}", dict(agreement(model.eval(), teacher.eval(), windows, bf16=bf16))))
        if followed is not teacher:
            found = dict(agreement(model, followed.eval(), windows, bf16=bf16))
            rows.append(loss_row(f"{arm}, {name}, beside what it follows", found) | {"peer": "teacher, trained on"})
    steps = read_metrics(run / "metrics.jsonl")
    rows.append({"name": f"{arm}, curve", "value": len(steps), "unit": "steps", "curve": curve(steps, seen)})
    return [*rows, *compared_recall(arm, model, teacher, tokenizer, args.length)]


def corrected(args: argparse.Namespace, device: torch.device) -> Ling:
    """The teacher as the arm `continued` left it."""
    run = args.work / f"continued-{args.seed}"
    if (checkpoint := latest_checkpoint(run)) is None:
        raise SystemExit(f"{run} holds no checkpoint: the arm continued comes first")
    teacher = openling.load(args.teacher, device=device).model.float()
    load_start(checkpoint, teacher)
    return teacher


def compared_recall(arm: str, model: Ling, teacher: Ling, tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Recall of a model in the end, beside the teacher's of the same facts."""
    windows = domain_windows(tokenizer, teacher.config.vocab_size, length)
    ours, theirs = (recall_rows(arm, m.eval(), tokenizer, windows, length) for m in (model, teacher))
    return [a | {"peer": "teacher", "peer_value": b["value"]} for a, b in zip(ours, theirs, strict=True)]


def loss_row(name: str, found: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
    """A model beside the teacher on one domain."""
    kept = {key: found[key] for key in ("gap", "gap_stderr", "kl", "top1")}
    teacher = {"peer": "teacher", "peer_value": found["teacher_loss"]}
    return {"name": name, "value": found["loss"], "unit": "nats per token", **teacher, "seconds": seconds, **kept}


def main() -> None:
    """The arms in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("arms", nargs="+", choices=[*MIGRATED, *TRAINED], metavar="ARM")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--rows", type=int, default=64, help="windows of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=TRAINED_ON["lr"], help="peak learning rate of the arms that are trained on")
    parser.add_argument("--after", default="best-all-mixers", choices=MIGRATED, help="arm whose hybrid is trained on")
    parser.add_argument("--seen", type=int, help="tokens that the arm `--after` was trained on (default: 2 N)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS)
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:split])
    args.flags = words[split + 1 :]
    args.work.mkdir(parents=True, exist_ok=True)
    said = shlex.join(["python", *sys.argv]).replace(str(args.work), "WORK")
    for arm in args.arms:
        out, path = args.work / f"{arm}-{args.seed}", args.results / f"{args.teacher.name.lower()}-{arm}-{args.seed}.json"
        if path.exists():
            print(f"{arm}: {path} is there")
            continue
        rows = migrated(args, arm, out) if arm in MIGRATED else trained(args, arm, out)
        write_results(path, said, rows)
        for row in rows:
            print(f"{row['name']}: {row['value']:.3f} {row['unit']}", flush=True)
        release_memory()


def release_memory() -> None:
    """What an arm held of the GPU, for the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
