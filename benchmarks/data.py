"""How fast corpora are built, verified and read, and how long a training step waits for its batch.

    python benchmarks/data.py TOKENIZER_FOLDER

Builds from the text that comes with the install (Python's documentation and sources), beside the tokenizers library alone on
the same text in the same run; reads batches from 64 M random tokens in documents of 600 on average. Writes
benchmarks/results/training/data.json.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from openling.config.data import MixtureConfig
from openling.data.build import BuildConfig, build
from openling.data.corpus import find_corpus
from openling.data.dataset import Dataset
from openling.data.dedup import copies, signatures
from openling.data.mixture import MixtureBatches
from openling.data.prefetch import Prefetcher
from openling.data.shards import write_index, write_shard
from openling.data.sources import Record, Source
from openling.data.tokens import Encoder, TokenizerInfo, describe
from openling.environment import write_results
from openling.weights.folder import load_tokenizer

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results/training/data.json"
TOKENS, SHARDS, ROWS, LENGTH = 64_000_000, 4, 64, 4096
# One step of a large model on a GPU is seconds long; this one is short on purpose.
STEP_SECONDS, STEPS = 0.2, 40


def main() -> None:
    """Measure, print, write."""
    tokenizer = load_tokenizer(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        rows = [*_building(Path(folder), tokenizer), *_reading(Path(folder))]
    for row in rows:
        print(row)
    command = shlex.join(["python", "benchmarks/data.py", "TOKENIZER_FOLDER"])
    write_results(RESULTS, command, rows)


def _row(name: str, value: float, unit: str, **judged: object) -> dict[str, object]:
    return {"name": name, "value": value, "unit": unit, "peer": None, "peer_value": None, "ratio": None} | judged


def _building(folder: Path, tokenizer: object) -> list[dict[str, object]]:
    texts = [d.text for d in find_corpus("python-code").select("train")]
    size = sum(len(t.encode()) for t in texts)
    for i, text in enumerate(texts):
        path = folder / "text" / f"{i:05d}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    info, as_json = describe(tokenizer)
    began = time.monotonic()
    tokens = sum(len(ids) for ids in Encoder(as_json, info).encode(texts))
    alone = time.monotonic() - began
    cores = len(os.sched_getaffinity(0))
    config = BuildConfig((Source("code", str(folder / "text")),), unit_bytes=2 << 20)
    began = time.monotonic()
    build(config, folder / "corpus", tokenizer, workers=cores)
    whole = time.monotonic() - began
    peer = {
        "peer": "tokenizers.encode_batch_fast alone, threads of its own",
        "peer_value": tokens / alone,
        "ratio": alone / whole,
    }
    found = [_row(f"build, {size / 1e6:.1f} MB of Python, {cores} processes, start included", tokens / whole, "tokens/s", **peer)]
    records = [Record(str(i), t, "s", "l", "en") for i, t in enumerate(texts)]
    began = time.monotonic()
    copies([signatures(records, "near")], "near", 0.8)
    return [
        *found,
        _row("near-duplicates: signatures and comparison, one process", size / 1e6 / (time.monotonic() - began), "MB/s"),
    ]


def _reading(folder: Path) -> list[dict[str, object]]:
    random, info, lines = np.random.default_rng(0), TokenizerInfo("random", 60_000, 0), []
    corpus = folder / "random"
    corpus.mkdir()
    for shard in range(SHARDS):
        documents = []
        for i, length in enumerate(random.geometric(1 / 600, TOKENS // SHARDS // 600)):
            ids = random.integers(1, 60_000, length + 1, dtype=np.uint16)
            ids[-1] = 0
            documents.append((Record(f"{shard}/{i}", "", "s", "l", "en"), ids))
        source = "ab"[shard % 2]
        lines.append(write_shard(corpus / f"{shard}.safetensors", documents, info) | {"source": source})
    sources = [{"name": n, "licence": "l", "language": "en", "tokens": 0, "documents": 0} for n in "ab"]
    index = {"tokenizer": info.as_json(), "settings": {}, "sources": sources, "shards": lines, "report": {"bad": 0, "steps": {}}}
    write_index(corpus, index)
    began = time.monotonic()
    assert not any(p for _, p in Dataset(corpus).verify())
    size = sum(line["bytes"] for line in lines)
    found = [_row("verify, every byte (file cache warm)", size / 1e9 / (time.monotonic() - began), "GB/s")]
    choices = [{"corpus": str(corpus), "source": n, "repeat": 100, "weight": w} for n, w in (("a", 0.64), ("b", 0.36))]
    batches = MixtureBatches(MixtureConfig(sources=choices, length=LENGTH), rows=ROWS)
    batches.batch(0)
    began = time.monotonic()
    for step in range(1, STEPS):
        batches.batch(step)
    speed = (STEPS - 1) * batches.tokens_per_step / (time.monotonic() - began)
    found.append(_row(f"batches of {ROWS} x {LENGTH} from a mixture of two, one thread", speed, "tokens/s"))
    with Prefetcher(batches) as ready:
        ready.batch(0)
        before, began = ready.waited_seconds, time.monotonic()
        for step in range(1, STEPS):
            time.sleep(STEP_SECONDS)
            ready.batch(step)
        share = (ready.waited_seconds - before) / (time.monotonic() - began)
    name = f"waiting for data, steps of {STEP_SECONDS} s with {ROWS * LENGTH:,} tokens, read ahead"
    return [*found, _row(name, share, "of the time", goal="≤ 0.01", met=share <= 0.01)]


if __name__ == "__main__":
    main()
