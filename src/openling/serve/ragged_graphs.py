"""CUDA graphs of small steps with prompts among them: a turn behind a cached prefix, a short prompt beside decoding sequences.

Op by op, launching such a step takes the host ten times as long as it takes the GPU. Here attention takes every token as a row
by itself, which reads its sequence's pages as if it were decoded, so nothing in the graph depends on where prompts begin and
end; the recurrence takes all sequences as packed documents, decoding ones with a single token. A token more is then a read of
the context more, mostly from L2, which is why long chunks over long contexts run op by op (they are not launch-bound).

Not for drafting engines, whose sequences have tokens waiting beside their states, nor for batch-invariant ones.

Legend: N tokens of a step, D documents, M model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from openling.model.capture import Capture, Replay
from openling.model.paged import PAGE, RaggedBatch
from openling.serve.graphs import Mirror
from openling.serve.scheduler import Plan

if TYPE_CHECKING:
    from openling.serve.runner import Runner

SIZES = (16, 32, 64, 128, 256)
# What all tokens of a step may read of pages: a few milliseconds of an H100.
READ_BYTES = 2**34


class RaggedGraphs:
    """Steps of up to 256 tokens, decoding or of prompts. most: sequences; width: pages of a table."""

    def __init__(self, runner: Runner, *, most: int, width: int, capture: Capture) -> None:
        self.runner, self.capture, store = runner, capture, runner.store
        self.most, device = most, runner.device
        self.bytes_per_token = sum(rows[0].nbytes for rows in store.rows.values()) // PAGE
        self._tokens = Mirror((SIZES[-1], 3), torch.int64, device)
        self._lengths = Mirror((SIZES[-1],), torch.int32, device)
        self._table = Mirror((SIZES[-1], width), torch.int32, device)
        self._bounds = Mirror((most + 2,), torch.int32, device)
        self._slots = Mirror((most + 1,), torch.int64, device)
        weight = runner.model.lm_head.weight
        self._hidden_NM = torch.zeros(SIZES[-1], weight.shape[1], dtype=weight.dtype, device=device)
        self._graphs: dict[tuple[int, int], Replay] = {}

    def serves(self, plan: Plan) -> bool:
        """Whether the step is small enough."""
        tokens = len(plan.decodes) + sum(c.end - c.start for c in plan.chunks)
        if tokens > SIZES[-1]:
            return False
        # Bounded from above: a chunk's first token reads less than its last.
        read = sum(s.computed + 1 for s in plan.decodes) + sum((c.end - c.start) * c.end for c in plan.chunks)
        return read * self.bytes_per_token <= READ_BYTES

    def run(self, plan: Plan, packed_3N: np.ndarray) -> tuple[RaggedBatch, Tensor]:
        """The batch and final hidden states [N, M]; valid until the next step."""
        count, real = len(plan.decodes) + len(plan.chunks), packed_3N.shape[1]
        size = next(n for n in SIZES if n >= real)
        # Documents cost states read and written, also empty ones: a step of one sequence has graphs of its own.
        documents = 2 if count == 1 else self.most + 1
        graph = self._graph(size, documents)
        self._fill(plan, packed_3N, size, documents)
        graph()
        return self._batch(size, documents), self._hidden_NM[:real]

    def warm_up(self) -> int:
        """Capture every size; returns how many there are."""
        sizes = [(size, documents) for size in reversed(SIZES) for documents in {2, self.most + 1}]
        for size, documents in sizes:
            self._graph(size, documents)
        return len(sizes)

    def _graph(self, size: int, documents: int) -> Replay:
        if (size, documents) not in self._graphs:
            # A capture runs the step: on padding alone, since a state must not take a token twice.
            self._fill(Plan(), np.zeros((3, 0), np.int64), size, documents)
            self._graphs[size, documents] = self.capture(lambda: self._step(size, documents))
        return self._graphs[size, documents]

    def _step(self, size: int, documents: int) -> None:
        self._hidden_NM[:size].copy_(self.runner.backbone(self._batch(size, documents)))

    def _batch(self, size: int, documents: int) -> RaggedBatch:
        ids, positions, rows = self._tokens.device[:size].unbind(1)
        return RaggedBatch(
            ids[None], positions[None], rows, decodes=size, table=self._table.device[:size], lengths=self._lengths.device[:size],
            cu_seqlens=self._bounds.device[: documents + 1], chunk_slots=self._slots.device[:documents], rowwise=True,
        )  # fmt: skip

    def _fill(self, plan: Plan, packed_3N: np.ndarray, size: int, documents: int) -> None:
        """The plan's tokens, then padding: a last document that nobody owns, between them empty ones."""
        store, real = self.runner.store, packed_3N.shape[1]
        tokens, lengths, table = self._tokens.host, self._lengths.host, self._table.host
        tokens[:real], tokens[real:size] = packed_3N.T, (0, 0, store.pages * PAGE)
        lengths[:real], lengths[real:size] = packed_3N[1] + 1, 0
        spans = [(s, s.computed, s.computed + 1) for s in plan.decodes] + [(c.sequence, c.start, c.end) for c in plan.chunks]
        bounds, slots = self._bounds.host, self._slots.host
        bounds[0] = 0
        bounds[len(spans) + 1 : documents], bounds[documents] = real, size
        slots[len(spans) : documents] = store.slots
        at = 0
        for i, (sequence, start, end) in enumerate(spans):
            held = -(-end // PAGE)
            table[at : at + end - start, :held] = sequence.table[:held]
            at += end - start
            bounds[i + 1], slots[i] = at, sequence.slot or 0
        for mirror in (self._tokens, self._lengths, self._table):
            mirror.send(size)
        self._bounds.send(documents + 1)
        self._slots.send(documents)
