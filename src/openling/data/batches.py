"""What the training loop reads: batches of packed documents, where batch number i is a function of i alone.

A row is T consecutive tokens of documents that end in an end-of-text token; a document that a row's end cuts is two documents
to the model. Rows lie flat behind one another as the model's packed row: `model(batch.flat_ids, cu_seqlens=batch.cu_seqlens)`.
Which rows make up batch i depends on seed and data, not on ranks: each rank gets its block of the same global batch.

Legend: R rows of this rank, T tokens of a row, N documents (or pieces of them) in the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from openling.data.order import shuffled, stable_key
from openling.errors import UserError

# The target of a token that predicts nothing; what PyTorch's cross-entropy leaves out by default.
NO_TARGET = -100
# Part of every fingerprint: counts up when the same data and seed would give other batches than before.
ORDER_VERSION = 1


@dataclass(frozen=True)
class PackedBatch:
    """Rows of tokens with the bounds of their documents.

    `targets` is the next token of the same document, also where the row ends before it, and NO_TARGET behind a document's end.
    """

    ids: Tensor
    """[R, T] int64."""
    targets: Tensor
    """[R, T] int64."""
    cu_seqlens: Tensor
    """[N + 1] int32: bounds of documents in the flat [R * T] tokens; every row's start is one."""
    tokens_by_source: Mapping[str, int] = field(default_factory=dict)
    """Tokens of these rows from each source, where the source of batches knows."""

    @property
    def flat_ids(self) -> Tensor:
        """[1, R * T]: the one packed row that the model takes with `cu_seqlens`."""
        return self.ids.reshape(1, -1)

    @property
    def flat_targets(self) -> Tensor:
        """[1, R * T]."""
        return self.targets.reshape(1, -1)

    def split(self, parts: int) -> list[PackedBatch]:
        """Blocks of whole rows, for accumulation; `parts` must divide the rows. Counts by source stay with the whole."""
        rows, length = self.ids.shape
        if rows % parts:
            raise UserError("the rows of a batch cannot be split evenly", value=f"{rows} rows", expected=f"a multiple of {parts}")
        step = rows // parts
        found = []
        for start in range(0, rows, step):
            first, last = start * length, (start + step) * length
            bounds = self.cu_seqlens[(self.cu_seqlens >= first) & (self.cu_seqlens <= last)] - first
            found.append(PackedBatch(self.ids[start : start + step], self.targets[start : start + step], bounds))
        return found

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from where a copy to a GPU does not wait."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        return replace(self, ids=change(self.ids), targets=change(self.targets), cu_seqlens=change(self.cu_seqlens))


@runtime_checkable
class BatchSource(Protocol):
    """Batches by number: nothing to save but the number, nothing to restore."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch, all ranks together."""
        ...

    def batch(self, step: int) -> PackedBatch:
        """This rank's rows of global batch `step`, counted from 0; the same at every call."""
        ...

    def fingerprint(self) -> str:
        """A hash of everything that decides the order, ranks excepted: stored in checkpoints, compared when a run resumes."""
        ...


def check_fingerprint(source: BatchSource, saved: str) -> None:
    """A `UserError` where a checkpoint was made with other batches than these."""
    if source.fingerprint() != saved:
        raise UserError(
            "the training data differ from those of the checkpoint",
            where="fingerprint of the batches",
            value=source.fingerprint()[:16],
            expected=saved[:16],
            next="resume with the same data, mixture, sequence length, batch size and seed, or train into a new folder",
        )


class TokenStream(Protocol):
    """Documents one behind the other as one long row of tokens."""

    name: str

    def __len__(self) -> int:
        """Tokens in all."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop, any integer type."""
        ...

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin among tokens start to stop, as places in the stream."""
        ...

    def fingerprint(self) -> str:
        """A hash of tokens and bounds."""
        ...


@dataclass(frozen=True)
class Windows:
    """A stream cut into windows of one length, anew for every epoch: other cuts, another order.

    The cuts begin at a place drawn for the epoch and go round the stream's end; the fewer than `length` tokens that are left
    over differ from epoch to epoch. A stream shorter than a window has none.
    """

    stream: TokenStream
    length: int
    key: str

    @property
    def count(self) -> int:
        """Windows of an epoch."""
        return len(self.stream) // self.length

    def places(self, draws: np.ndarray) -> np.ndarray:
        """Where each of these draws begins in the stream; draws run on from 0 through the epochs."""
        epochs, indices = np.divmod(draws, self.count)
        found = np.empty(len(draws), np.int64)
        for epoch in np.unique(epochs).tolist():
            here, total = epochs == epoch, len(self.stream)
            offset = stable_key(self.key, "offset", epoch) % total
            order = shuffled(indices[here], self.count, stable_key(self.key, "order", epoch))
            found[here] = (offset + self.length * order) % total
        return found

    def fill(self, place: int, ids: np.ndarray, targets: np.ndarray) -> list[int]:
        """Write the tokens and targets of the window at `place`; returns where its documents begin, 0 first."""
        total, done = len(self.stream), 0
        bounds = [0]
        while done < self.length:  # twice where the window goes round the end
            stop = min(place + self.length - done, total)
            more = min(stop + 1, total)  # one further: the last token's target
            tokens = self.stream.read(place, more)
            size = stop - place
            ids[done : done + size] = tokens[:size]
            targets[done : done + size - 1] = tokens[1:size]
            targets[done + size - 1] = tokens[size] if more > stop else NO_TARGET
            starts = self.stream.starts(place, more) - place
            for start in starts.tolist():
                if start:
                    targets[done + start - 1] = NO_TARGET
                if start < size:
                    bounds.append(done + start)
            done, place = done + size, 0
            if done < self.length:
                bounds.append(done)
        return sorted(set(bounds))


class MemoryStream:
    """Documents in memory, as token arrays that already end as they should."""

    def __init__(self, documents: Sequence[np.ndarray | Sequence[int]], *, name: str = "memory") -> None:
        self.name = name
        arrays = [np.asarray(d, np.int64) for d in documents if len(d)]
        self._tokens = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
        self._starts = np.cumsum([0, *(len(a) for a in arrays)])[:-1].astype(np.int64)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop."""
        return self._tokens[start:stop]

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Starts of documents from start to before stop."""
        first, last = np.searchsorted(self._starts, [start, stop])
        return self._starts[first:last]

    def fingerprint(self) -> str:
        """A hash of tokens and bounds."""
        return hashlib.sha256(self._tokens.tobytes() + b"|" + self._starts.tobytes()).hexdigest()


def rank_rows(rows: int, rank: int, world: int) -> range:
    """The rows of a global batch that a rank reads; a `UserError` where they cannot be shared evenly."""
    if rows % world:
        raise UserError("the batch cannot be shared evenly", value=f"{rows} rows", expected=f"a multiple of {world} ranks")
    if not 0 <= rank < world:
        raise UserError("there is no such rank", value=rank, expected=f"0 to {world - 1}")
    return range(rank * rows // world, (rank + 1) * rows // world)


class MemoryBatches:
    """A `BatchSource` over one text in memory: small corpora, warm-ups, tests. Epochs follow one another for ever."""

    def __init__(
        self,
        documents: Sequence[np.ndarray | Sequence[int]],
        *,
        length: int,
        rows: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._windows = Windows(MemoryStream(documents), length, f"memory/{seed}")
        self._rows, self._mine = rows, rank_rows(rows, rank, world)
        if not self._windows.count:
            size = len(self._windows.stream)
            raise UserError("the text is too short for one row", value=f"{size} tokens", expected=f"{length} tokens")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self._rows * self._windows.length

    def batch(self, step: int) -> PackedBatch:
        """This rank's rows of batch `step`."""
        length = self._windows.length
        ids, targets = (np.empty((len(self._mine), length), np.int64) for _ in range(2))
        bounds: list[int] = []
        for i, place in enumerate(self._windows.places(step * self._rows + np.array(self._mine)).tolist()):
            bounds += [i * length + b for b in self._windows.fill(place, ids[i], targets[i])]
        return packed(ids, targets, bounds, {self._windows.stream.name: ids.size})

    def fingerprint(self) -> str:
        """A hash of text, length, rows and seed."""
        what = (ORDER_VERSION, self._windows.stream.fingerprint(), self._windows.length, self._windows.key, self._rows)
        return hashlib.sha256(repr(what).encode()).hexdigest()


def packed(ids: np.ndarray, targets: np.ndarray, starts: list[int], tokens_by_source: Mapping[str, int]) -> PackedBatch:
    """A batch from arrays [R, T] and the places where documents begin in the flat tokens."""
    bounds = torch.tensor([*starts, ids.size], dtype=torch.int32)
    return PackedBatch(torch.from_numpy(ids), torch.from_numpy(targets), bounds, tokens_by_source)
