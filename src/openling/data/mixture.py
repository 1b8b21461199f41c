"""Mixtures of built corpora: every batch in exact proportion, and batch number i a function of (seed, i, mixture) alone.

Rows are dealt to lanes (short windows, long documents), windows within a lane to sources or their languages (`order.Shares`),
and a source's draws walk through its shuffled windows, epoch after epoch (`batches.Windows`). All of it is arithmetic on the
row's number: nothing is saved but the step, ranks only choose rows, and a mixture's needs are counted before the first step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from openling.config.data import MixtureConfig, SourceConfig
from openling.data.batches import ORDER_VERSION, PackedBatch, TokenStream, Windows, packed, rank_rows
from openling.data.dataset import Dataset, ShardStream
from openling.data.order import Shares, stable_key
from openling.data.shards import Shard
from openling.errors import UserError, nearest

# Weights by temperature are irrational; this many decimals of them count.
DIGITS = 9


class RunsStream:
    """Some documents of a stream, as a stream of their own: runs of neighbours that were chosen together."""

    def __init__(self, stream: TokenStream, runs_N2: np.ndarray, what: str) -> None:
        self.name, self._stream, self._what = stream.name, stream, what
        self._runs = runs_N2.astype(np.int64)
        self._ends = np.cumsum(self._runs[:, 1] - self._runs[:, 0])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(start and stop in the whole stream, what to subtract there) of a range."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[number - 1]) if number else 0
            end = min(stop, int(self._ends[number]))
            shift = int(self._runs[number, 0]) - first
            yield start + shift, end + shift, shift
            start, number = end, number + 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop."""
        return np.concatenate([self._stream.read(a, b) for a, b, _ in self._parts(start, stop)])

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin from start to before stop."""
        return np.concatenate([self._stream.starts(a, b) - shift for a, b, shift in self._parts(start, stop)])

    def fingerprint(self) -> str:
        """That of the whole stream, and how documents were chosen."""
        return f"{self._stream.fingerprint()}/{self._what}"


def by_length(stream: ShardStream, least: int) -> tuple[RunsStream, RunsStream]:
    """(documents of fewer than `least` tokens, the longer ones)."""
    lengths = stream.document_lengths()
    ends = np.cumsum(lengths)
    long = lengths >= least
    edges = np.flatnonzero(np.diff(long)) + 1
    first = np.concatenate(([0], edges)).astype(np.int64)
    last = np.concatenate((edges, [len(long)])).astype(np.int64)
    runs = np.stack((ends[first] - lengths[first], ends[last - 1]), 1)
    return RunsStream(stream, runs[~long[first]], f"below {least}"), RunsStream(stream, runs[long[first]], f"from {least}")


@dataclass(frozen=True)
class Need:
    """What a mixture asks of a source over a whole run."""

    source: str
    group: str
    tokens: int
    """Asked for."""
    available: int
    """Tokens of an epoch."""
    epochs: float
    repeat: float


@dataclass(frozen=True)
class _Lane:
    """Windows of one length in a row, and the sources they come from."""

    windows: tuple[Windows, ...]
    choices: tuple[SourceConfig, ...]
    shares: Shares
    per_row: int


class MixtureBatches:
    """A `BatchSource` over built corpora.

    rows: of the global batch. ramp: (first step that no longer has them, rows) of smaller batches before, in order. steps: how
    many the run will take; a mixture that cannot give them is a `UserError` here. vocab_size, tokenizer: of the model, compared
    with the corpora's.
    """

    def __init__(
        self,
        config: MixtureConfig,
        *,
        rows: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        steps: int | None = None,
        ramp: Sequence[tuple[int, int]] = (),
        vocab_size: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.config, self.seed = config, seed
        self._rank, self._world, self._rows, self._ramp = rank, world, rows, tuple(ramp)
        for count in (rows, *(r for _, r in ramp)):
            rank_rows(count, rank, world)
        choices, self._streams = _streams(config, vocab_size, tokenizer)
        self._lanes = _lanes(config, choices, self._streams, seed)
        self._lane_shares = Shares(_lane_weights(config), key=stable_key(seed, "lanes"))
        self._fingerprint = self._hash([s.fingerprint() for s in self._streams])
        if steps is not None:
            self.check(steps)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch, behind the ramp."""
        return self._rows * self.config.row_length

    def rows_at(self, step: int) -> int:
        """Rows of global batch `step`."""
        return next((rows for stop, rows in self._ramp if step < stop), self._rows)

    def first_row(self, step: int) -> int:
        """How many rows all earlier batches had."""
        total, start = 0, 0
        for stop, rows in self._ramp:
            total += rows * max(0, min(stop, step) - start)
            start = stop
        return total + self._rows * max(0, step - start)

    def needs(self, steps: int) -> list[Need]:
        """What `steps` batches ask of each source, long and short documents of one apart."""
        found = []
        for lane, rows in zip(self._lanes, self._lane_shares.dealt(self.first_row(steps)), strict=True):
            for w, choice, draws in zip(lane.windows, lane.choices, lane.shares.dealt(rows * lane.per_row), strict=True):
                name = w.stream.name + (f" (windows of {w.length})" if len(self._lanes) > 1 else "")
                epochs = draws / w.count if w.count else float("inf" if draws else 0)
                found.append(Need(name, choice.group, draws * w.length, len(w.stream), epochs, choice.repeat))
        return found

    def check(self, steps: int) -> None:
        """A `UserError` that names every source which cannot give what `steps` batches ask."""
        short = [need for need in self.needs(steps) if need.epochs > need.repeat]
        if short:
            lines = [f"{n.source}: {n.tokens:,} asked, {n.available:,} there, repeat {n.repeat:g}" for n in short]
            enough = ", ".join(f"{ceil(n.epochs)} for {n.source}" for n in short)
            raise UserError(
                "the mixture cannot be met",
                where=f"{steps:,} steps of {self.tokens_per_step:,} tokens",
                value="; ".join(lines),
                expected="at most `repeat` epochs of each source",
                next=f"fewer steps, more text, other shares, or repeat = {enough}",
            )

    def check_shards(self, checked: set[Path]) -> None:
        """A `UserError` where size, header or sampled blocks of a shard that is read here are not the index's.

        checked: shards to leave out, which those found sound join. None stays open.
        """
        for path, line, tokenizer in (place for stream in self._streams for place in stream.shards()):
            if path not in checked:
                Shard(path, line, tokenizer)
                checked.add(path)

    def batch(self, step: int) -> PackedBatch:
        """This rank's rows of global batch `step`."""
        mine, first = rank_rows(self.rows_at(step), self._rank, self._world), self.first_row(step)
        length = self.config.row_length
        ids, targets = (np.empty((len(mine), length), np.int64) for _ in range(2))
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (lane, source): (where in the flat batch, draw)
        for i, row in enumerate(mine):
            number, draw = self._lane_shares.deal(first + row)
            lane = self._lanes[number]
            for j in range(lane.per_row):
                source, index = lane.shares.deal(draw * lane.per_row + j)
                wanted.setdefault((number, source), []).append((i * length + j * (length // lane.per_row), index))
        bounds: list[int] = []
        counts: dict[str, int] = {}
        flat_ids, flat_targets = ids.reshape(-1), targets.reshape(-1)
        for (number, source), places in wanted.items():
            windows, choice = self._lanes[number].windows[source], self._lanes[number].choices[source]
            draws = np.array([draw for _, draw in places])
            if int(draws.max()) >= choice.repeat * windows.count:
                self.check(step + 1)
            for (at, _), place in zip(places, windows.places(draws).tolist(), strict=True):
                window = slice(at, at + windows.length)
                bounds += [at + b for b in windows.fill(place, flat_ids[window], flat_targets[window])]
            counts[windows.stream.name] = counts.get(windows.stream.name, 0) + windows.length * len(places)
        return packed(ids, targets, sorted(bounds), counts)

    def fingerprint(self) -> str:
        """A hash of corpora, mixture, rows and seed; folders may move, `repeat` may be raised."""
        return self._fingerprint

    def _hash(self, streams: list[str]) -> str:
        settings = self.config.model_dump(mode="json", exclude={"sources"})
        weights = [lane.shares.weights for lane in self._lanes]
        what = [ORDER_VERSION, streams, settings, weights, self.seed, self._rows, self._ramp]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _streams(config: MixtureConfig, vocab_size: int | None, tokenizer: Any) -> tuple[list[SourceConfig], list[ShardStream]]:
    """Every source's stream, or those of its languages, beside what was asked for; the corpora must have one tokenizer, and
    that of the model.
    """
    opened: dict[Path, Dataset] = {}
    choices, streams, wholes = [], [], []
    for choice in config.sources:
        folder = Path(choice.corpus)
        dataset = opened.setdefault(folder, opened.get(folder) or Dataset(folder))
        first = next(iter(opened.values()))
        if dataset.tokenizer != first.tokenizer:
            raise UserError("the corpora have different tokenizers", value=folder, expected=f"that of {first.folder}")
        names = list(dataset.sources)
        if choice.source is None and len(names) > 1:
            raise UserError("the corpus has several sources", where=folder, expected=f"source = one of {', '.join(names)}")
        whole = dataset.stream(choice.source or names[0])
        parts = [whole] if choice.by is None else _languages(dataset, whole.name, choice.languages)
        choices += [choice] * len(parts)
        streams += parts
        wholes += [whole.fingerprint()] * len(parts)
    for dataset in opened.values():
        if vocab_size is not None:
            dataset.check_model(vocab_size)
        if tokenizer is not None:
            dataset.check_tokenizer(tokenizer)
    found = [s.fingerprint() for s in streams]
    for stream, own, source in zip(streams, found, wholes, strict=True):
        if found.count(own) > 1 or (own != source and source in found):
            what, expected = "a source stands in the mixture twice", "each once: raise its weight instead"
            raise UserError(what, value=stream.name, expected=expected)
    return choices, streams


def _languages(dataset: Dataset, source: str, wanted: Sequence[str] | None) -> list[ShardStream]:
    """The streams of a source's languages: all of them, or those that are wanted."""
    there = dataset.languages(source)
    if unknown := next((name for name in wanted or () if name not in there), None):
        what, expected = f"{source} has no documents of this language", ", ".join(there)
        raise UserError(what, where=dataset.folder, value=unknown, expected=expected, nearest=nearest(unknown, there))
    return [there[name] for name in wanted or there]


def _lane_weights(config: MixtureConfig) -> list[Fraction]:
    """Rows of each lane, as weights."""
    if config.long is None:
        return [Fraction(1)]
    share = Fraction(str(config.long.share))
    if config.long.of == "tokens":
        return [1 - share, share]
    # A row holds one long window or `per_row` short ones.
    per_row = config.long.length // config.length
    return [(1 - share) / per_row, share]


def _lanes(config: MixtureConfig, choices: list[SourceConfig], streams: list[ShardStream], seed: int) -> list[_Lane]:
    def lane(name: str, of: Sequence[TokenStream], length: int, per_row: int) -> _Lane:
        return _lane(config, name, list(zip(choices, of, strict=True)), length, per_row, seed)

    if config.long is None:
        return [lane("short", streams, config.length, 1)]
    least = config.long.min_document or config.long.length
    split = [by_length(stream, least) for stream in streams]
    short = lane("short", [s for s, _ in split], config.length, config.long.length // config.length)
    return [short, lane("long", [s for _, s in split], config.long.length, 1)]


def _lane(
    config: MixtureConfig, name: str, streams: list[tuple[SourceConfig, TokenStream]], length: int, per_row: int, seed: int
) -> _Lane:
    """The sources that have a window of this length, weighed within their groups."""
    chosen = [(c, Windows(s, length, f"{seed}/{name}/{s.fingerprint()}")) for c, s in streams]
    chosen = [(c, w) for c, w in chosen if w.count]
    within = _weights(config, chosen)
    totals = {g: sum(w for (c, _), w in zip(chosen, within, strict=True) if c.group == g) for g in config.shares}
    shares = {group: Fraction(str(share)) for group, share in config.shares.items()}
    weights = [shares[c.group] * w / totals[c.group] for (c, _), w in zip(chosen, within, strict=True)]
    if missing := set(config.shares) - {c.group for c, _ in chosen}:
        long = config.long if name == "long" else None
        value = f"windows of {length} tokens" + (f", documents of {long.min_document or length} and more" if long else "")
        raise UserError(
            "a group has no text for these windows",
            where=", ".join(sorted(missing)),
            value=value,
            expected="at least one window's worth",
            next="add a source, shorten the windows" + (", or lower long.min_document" if long else ""),
        )
    return _Lane(tuple(w for _, w in chosen), tuple(c for c, _ in chosen), Shares(weights, key=stable_key(seed, name)), per_row)


def _weights(config: MixtureConfig, chosen: list[tuple[SourceConfig, Windows]]) -> list[Fraction]:
    """What each weighs in its group. Languages of a source that has a weight share it as they would share the group."""
    sizes = [_size(config, choice, windows) for choice, windows in chosen]

    def weight(choice: SourceConfig, size: Fraction) -> Fraction:
        if choice.weight is None:
            return size
        of_source = sum(s for (c, _), s in zip(chosen, sizes, strict=True) if c is choice)
        return Fraction(str(choice.weight)) * size / of_source

    return [weight(choice, size) for (choice, _), size in zip(chosen, sizes, strict=True)]


def _size(config: MixtureConfig, choice: SourceConfig, windows: Windows) -> Fraction:
    power = 1 / config.temperature.get(choice.group, 1.0)
    if power == 1:
        return Fraction(len(windows.stream))
    return max(Fraction(round(len(windows.stream) ** power * 10**DIGITS), 10**DIGITS), Fraction(1, 10**DIGITS))
