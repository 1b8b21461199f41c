"""A small fine-grained MoE teacher of Ling-2.0's shape, from nothing, for `benchmarks/migration.py`.

    python benchmarks/moe_teacher.py WORK TEXT [--share S] [-- FLAGS OF openling train]

TEXT is a JSONL file or a folder of them (`benchmarks/fetch_text.py` writes such). WORK gets a tokenizer, a corpus in a share of
whose documents facts recur (`openling data build --synthesis recall`), and the run of moe_teacher.toml; a run that was stopped
goes on with the same command. The teacher is WORK/run/models/ling-moe. Writes benchmarks/results/migration/moe-teacher.json: its
loss on held-out text, and its recall, which must exceed 95 % up to its context for a student's recall to say anything.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from migration import RESULTS, curve, domain_windows, read_metrics, recall_rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import openling
from openling.cli import main as command_line
from openling.data.sources import JSONL
from openling.environment import write_results
from openling.migrate.measure import agreement
from openling.model.device import pick_device

RECIPE = Path(__file__).with_suffix(".toml")
END = "<|endoftext|>"
# Characters that the tokenizer is fitted to, as many of every file.
SAMPLE = 20_000_000
GOAL = 0.95


def files(text: Path) -> list[Path]:
    """The JSONL files at a path, by name."""
    return sorted(p for p in text.iterdir() if p.name.endswith(JSONL)) if text.is_dir() else [text]


def sample(paths: list[Path]) -> Iterator[str]:
    """The first documents of every file."""
    for path in paths:
        left = SAMPLE // len(paths)
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for line in lines:
                text = json.loads(line)["text"][:left]
                yield text
                left -= len(text)
                if left <= 0:
                    break


def make_tokenizer(paths: list[Path], vocabulary: int, out: Path) -> None:
    """A byte-level BPE with a token per digit, and the space before it: numbers that are recalled are as long as they look."""
    inner = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Split(Regex(r" ?\d"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    inner.train_from_iterator(sample(paths), trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END).save_pretrained(out)


def openling_command(*words: object) -> None:
    """A command of openling; its failure ends this one."""
    if code := command_line([str(word) for word in words]):
        raise SystemExit(code)


def measure(teacher: Path, run: Path, device: torch.device) -> list[dict[str, Any]]:
    """Loss by domain, recall, and the curves of both stages."""
    loaded = openling.load(teacher, device=device)
    model, length = loaded.model.float().eval(), loaded.config.max_position_embeddings
    windows = domain_windows(loaded.tokenizer, loaded.config.vocab_size, length)
    rows: list[dict[str, Any]] = []
    for name, text in windows.items():
        found = agreement(model, model, text, bf16=device.type == "cuda")
        rows.append({"name": f"teacher, {name}", "value": found["loss"], "unit": "nats per token"})
    recall = recall_rows("teacher", model, loaded.tokenizer, windows, length)
    rows += [
        {**row, "goal": f"> {GOAL} with one fact", "met": row["value"] > GOAL} if row["keys"] == 1 else row for row in recall
    ]
    tokens = 0
    for stage in sorted((run / "stages").iterdir(), key=lambda p: (p / "metrics.jsonl").stat().st_mtime):
        steps = read_metrics(stage / "metrics.jsonl")
        speed = statistics.median(s["tokens_per_s"] for s in steps)
        rows.append({"name": f"{stage.name}, speed", "value": speed, "unit": "tokens/s"})
        rows.append({"name": f"{stage.name}, curve", "value": len(steps), "unit": "steps", "curve": curve(steps, tokens)})
        tokens += steps[-1]["tokens"]
    return rows


def main() -> None:
    """Tokenizer, corpus, training, measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--share", type=float, default=0.4, help="of the documents, that facts are put into")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS / "moe-teacher.json")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:split])
    tokenizer, corpus, run = (args.work / name for name in ("tokenizer", "corpus", "run"))
    if not tokenizer.exists():
        make_tokenizer(files(args.text), args.vocabulary, tokenizer)
    domain_windows(AutoTokenizer.from_pretrained(tokenizer), args.vocabulary, 2)  # what is missing is missed before the training
    if not corpus.exists():
        facts = ("--synthesis", f"recall:share={args.share}")
        openling_command("data", "build", f"text={args.text}", corpus, "--tokenizer", tokenizer, *facts)
    settings = {"model.tokenizer": tokenizer, "model.overrides.vocab_size": args.vocabulary, "corpora.corpus.path": corpus}
    flags = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    resume = ["--resume"] if (run / "recipe.json").exists() else []
    openling_command("train", RECIPE, "--out", run, "--device", args.device, *flags, *words[split + 1 :], *resume)
    rows = measure(run / "models" / "ling-moe", run, pick_device(args.device))
    said = shlex.join(["python", *sys.argv]).replace(str(args.work), "WORK").replace(str(args.text), "TEXT")
    write_results(args.results, said, rows)
    for row in rows:
        print(f"{row['name']}: {row['value']:.3f} {row['unit']}")


if __name__ == "__main__":
    main()
