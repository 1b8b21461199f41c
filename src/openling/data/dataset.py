"""A built corpus: opened cheaply, read by source as one long row of tokens, verified to the byte on request."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from openling.data.shards import Shard, language_ranges, read_index
from openling.data.sources import UNKNOWN_LANGUAGE
from openling.data.tokens import TokenizerInfo, describe
from openling.errors import OpenlingError, UserError, nearest

# Each holds a file descriptor, of which many systems give a process 1,024.
OPEN_SHARDS = 512
# A shard's line of the index, and the first token and the one behind the last of what is read there.
Place = tuple[dict[str, Any], int, int]


class Dataset:
    """The corpus in a folder. Every shard's presence and size are checked now, its blocks when it is first read.

    check=False leaves the first to `verify`, which names every damaged shard.
    """

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.tokenizer = TokenizerInfo(**self.index["tokenizer"])
        self._open: dict[str, Shard] = {}
        for line in self.index["shards"] if check else ():
            path = self.folder / line["file"]
            size = path.stat().st_size if path.exists() else None
            if size != line["bytes"]:
                Shard(path, line, self.tokenizer)  # says what is wrong

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """Name: tokens, documents, licence, language."""
        return {s["name"]: s for s in self.index["sources"]}

    @property
    def tokens(self) -> int:
        """Tokens of all sources."""
        return sum(line["tokens"] for line in self.index["shards"])

    def stream(self, source: str) -> ShardStream:
        """The documents of one source, in the order of the build."""
        return ShardStream(self, source, [(line, 0, line["tokens"]) for line in self._lines(source)])

    def languages(self, source: str) -> dict[str, ShardStream]:
        """The documents of each language of a source, by its name; a `UserError` where none names one."""
        places: dict[str, list[Place]] = {}
        for line in self._lines(source):
            for name, (start, stop) in language_ranges(self.folder / line["file"], line).items():
                places.setdefault(name, []).append((line, start, stop))
        if set(places) == {UNKNOWN_LANGUAGE}:
            raise UserError(
                "no document of this source names its language", where=self.folder, value=source,
                expected="a column that does, or a source of each language",
                next="openling data build with --language-field NAME, or --language NAME=L for each source",
            )  # fmt: skip
        return {name: ShardStream(self, f"{source}/{name}", places[name]) for name in sorted(places)}

    def shard(self, line: dict[str, Any]) -> Shard:
        """A shard by its line of the index, checked when it is opened; those read last stay open."""
        shard = self._open.pop(line["file"], None) or Shard(self.folder / line["file"], line, self.tokenizer)
        self._open[line["file"]] = shard
        if len(self._open) > OPEN_SHARDS:
            del self._open[next(iter(self._open))]
        return shard

    def _lines(self, source: str) -> list[dict[str, Any]]:
        if source not in self.sources:
            close = nearest(source, self.sources)
            expected = ", ".join(self.sources)
            raise UserError("the corpus has no such source", where=self.folder, value=source, expected=expected, nearest=close)
        return [line for line in self.index["shards"] if line["source"] == source]

    def check_tokenizer(self, tokenizer: Any) -> None:
        """A `UserError` where the corpus was tokenised with another tokenizer than this transformers one."""
        info, _ = describe(tokenizer)
        if info != self.tokenizer:
            raise UserError(
                "the corpus was tokenised with another tokenizer",
                where=self.folder,
                value=f"{self.tokenizer.sha256[:16]}, {self.tokenizer.vocab_size} tokens",
                expected=f"{info.sha256[:16]}, {info.vocab_size} tokens, as the model has",
                next="openling data build SOURCES OUT --tokenizer MODEL",
            )

    def check_model(self, vocab_size: int) -> None:
        """A `UserError` where the corpus has ids that the model has not."""
        if self.tokenizer.vocab_size > vocab_size:
            raise UserError(
                "the corpus has tokens that the model has not",
                where=self.folder,
                value=f"{self.tokenizer.vocab_size} tokens",
                expected=f"at most vocab_size = {vocab_size}",
            )

    def verify(self) -> Iterator[tuple[str, list[str]]]:
        """(shard, what is wrong with it) of every shard, from every byte."""
        for line in self.index["shards"]:
            try:
                problems = Shard(self.folder / line["file"], line, self.tokenizer).problems(self.tokenizer)
            except OpenlingError as error:
                problems = [error.what + (f" ({error.parts['value']})" if error.parts["value"] else "")]
            yield line["file"], problems


# Tokens that stay together where a corpus is read in scattered order: the longest window a warm-up is likely to cut from it.
SCATTERED_BLOCK = 8192


def is_dataset(folder: str | Path) -> bool:
    """Whether `openling data build` made this folder."""
    return (Path(folder) / "index.json").is_file()


def scattered_tokens(
    folders: Sequence[str | Path], tokenizer: Any, *, vocab_size: int, max_tokens: int | None, block: int = SCATTERED_BLOCK
) -> np.ndarray:
    """Tokens of built corpora as one int32 array: blocks of all sources in a fixed scattered order, at most `max_tokens`.

    Only what is returned is read. Each source is there by its share of the tokens; another tokenizer is a `UserError`.
    block: tokens that stay together.
    """
    streams: list[ShardStream] = []
    for dataset in map(Dataset, folders):
        dataset.check_tokenizer(tokenizer)
        dataset.check_model(vocab_size)
        streams += [dataset.stream(source) for source in dataset.sources]
    ends = np.cumsum([-(-len(stream) // block) for stream in streams], dtype=np.int64)
    parts: list[np.ndarray] = [np.empty(0, np.int32)]
    count = 0
    for index in np.random.default_rng(0).permutation(ends[-1]):
        if max_tokens is not None and count >= max_tokens:
            break
        which = int(np.searchsorted(ends, index, side="right"))
        stream, start = streams[which], int(index - (ends[which - 1] if which else 0)) * block
        parts.append(stream.read(start, min(start + block, len(stream))).astype(np.int32))
        count += len(parts[-1])
    return np.concatenate(parts)[:max_tokens]


class ShardStream:
    """A `TokenStream` over shards of one source, or a range of each; a shard is opened when it is read."""

    def __init__(self, dataset: Dataset, name: str, places: Sequence[Place]) -> None:
        self.dataset, self.name, self._places = dataset, name, places
        self._ends = np.cumsum([stop - start for _, start, stop in places], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def shards(self) -> Iterator[tuple[Path, dict[str, Any], TokenizerInfo]]:
        """What each shard of this stream is opened with."""
        return ((self.dataset.folder / line["file"], line, self.dataset.tokenizer) for line, _, _ in self._places)

    def shard(self, number: int) -> Shard:
        """A shard of this stream by its place."""
        return self.dataset.shard(self._places[number][0])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int, int]]:
        """(shard, where its first token is or would be in the stream, start and stop inside it) of a range."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[number - 1]) if number else 0
            end = min(stop, int(self._ends[number]))
            first -= self._places[number][1]
            yield self.shard(number), first, start - first, end - first
            start, number = end, number + 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop; a `UserError` where one cannot be the tokenizer's."""
        parts = [(shard, shard.tokens[a:b]) for shard, _, a, b in self._parts(start, stop)]
        for shard, tokens in parts:
            if int(tokens.max()) >= self.dataset.tokenizer.vocab_size:
                raise UserError(
                    "the shard is damaged: a token is beyond the vocabulary",
                    where=shard.path,
                    value=int(tokens.max()),
                    expected=f"below {self.dataset.tokenizer.vocab_size}",
                    next="openling data verify",
                )
        return parts[0][1] if len(parts) == 1 else np.concatenate([tokens for _, tokens in parts])

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin from start to before stop."""
        return np.concatenate([first + shard.starts(a, b) for shard, first, a, b in self._parts(start, stop)])

    def document_lengths(self) -> np.ndarray:
        """Tokens of every document, from the tables of all shards."""
        lengths = [np.empty(0, np.int64)]
        for number, (_, start, stop) in enumerate(self._places):
            ends = self.shard(number).ends
            first, last = np.searchsorted(ends, [start, stop], side="right")
            lengths.append(np.diff(ends[first:last], prepend=start))
        return np.concatenate(lengths)

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.dataset.tokenizer.sha256} {self.name}".encode())
        for line, _, _ in self._places:
            digest.update(line["sha256"].encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """A hash of the shards' hashes and the tokenizer's: moves with the folder, changes with its content."""
        return self._fingerprint
