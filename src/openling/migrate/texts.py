"""The texts of a migration: tokens to fit and train on, held-out windows to measure on, and whose they are.

A text is a built-in one's name, a path, or what `openling data build` made. Where one is named for training and evaluation both,
each reads its own documents. A built corpus is not divided so: what is evaluated on must be another one than those trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from openling.config.migrate import Text
from openling.data.corpus import BUILT_IN, Part, find_corpus, mixture
from openling.data.dataset import Dataset, is_dataset, scattered_tokens
from openling.data.pack import cut_windows, tokenise
from openling.errors import UserError


def training_tokens(text: Text, tokenizer: Any, *, vocab_size: int, max_tokens: int) -> np.ndarray:
    """int32 tokens of the calibration texts, at most `max_tokens`; a `UserError` where built corpora stand beside other texts."""
    if any(map(is_dataset, text.calibration)):
        for name in text.calibration:
            if not is_dataset(name):
                raise UserError("built corpora and texts cannot be mixed", where="--text", value=name, next="openling data build")
        return scattered_tokens(text.calibration, tokenizer, vocab_size=vocab_size, max_tokens=max_tokens)
    # The user's own text is held back only where it is evaluated on too.
    measured = {*domains(text).values(), *BUILT_IN}
    parts: list[Part] = ["train" if name in measured else "all" for name in text.calibration]
    return tokenise(mixture(text.calibration, parts), tokenizer, vocab_size=vocab_size, max_tokens=max_tokens)


def domains(text: Text) -> dict[str, str]:
    """The evaluation texts by the name that they have in reports: NAME of `NAME=TEXT`, else the last part of the path."""
    found: dict[str, str] = {}
    for word in text.evaluation:
        name, equals, path = word.partition("=")
        if not equals or not name or "/" in name or Path(word).exists():
            last = Path(word).name or word
            name, path = word if last in found else last, word
        if name in found:
            raise UserError(
                "two texts have the same name", where="--eval-text", value=name, expected="different names", next="NAME=TEXT"
            )
        found[name] = path
    return found


def evaluation_windows(text: Text, tokenizer: Any, *, vocab_size: int) -> dict[str, np.ndarray]:
    """Held-out windows [N, T = sequence_length], int32, by domain."""
    length, most, out = text.sequence_length, text.evaluation_tokens, {}
    corpora = [name for name in text.calibration if is_dataset(name)]
    trained = {shard for name in corpora for shard in _shards(name)}
    for label, name in domains(text).items():
        # What a corpus was built from is not known; of built-in texts `openling data build` takes the train part only.
        part: Part = "heldout" if name in text.calibration or (corpora and name in BUILT_IN) else "all"
        if is_dataset(name):
            if trained & _shards(name):
                raise UserError(
                    "a built corpus cannot be learnt from and held out",
                    where="--eval-text",
                    value=name,
                    expected="shards that no corpus of --text has",
                    next="openling data build OTHER-SOURCES OUT --tokenizer MODEL",
                )
            tokens = scattered_tokens([name], tokenizer, vocab_size=vocab_size, max_tokens=most, block=length)
        else:
            tokens = tokenise(find_corpus(name).documents(part), tokenizer, vocab_size=vocab_size, max_tokens=most)
        out[label] = cut_windows(tokens, length, where=f"evaluation text {name}, {part} documents")
    return out


def _shards(folder: str) -> set[str]:
    """The hashes of a built corpus's shards."""
    return {line["sha256"] for line in Dataset(folder).index["shards"]}


def origins(text: Text) -> list[dict[str, Any]]:
    """Name, licence, source and role of every text, source by source where a corpus was built."""
    found = [("calibration and warm-ups", "", name) for name in text.calibration]
    found += [("evaluation", label, name) for label, name in domains(text).items()]
    rows = []
    for role, label, name in found:
        if is_dataset(name):
            sources, prefix = Dataset(name).sources.values(), f"{label}: " if label else ""
            rows += [{"name": prefix + s["name"], "licence": s["licence"], "source": name, "role": role} for s in sources]
            continue
        corpus = find_corpus(name)
        rows.append({"name": label or corpus.name, "licence": corpus.licence, "source": corpus.source, "role": role})
    return rows
