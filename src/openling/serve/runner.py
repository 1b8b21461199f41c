"""Runs the model on a step's plan: host lists become one packed row on the device, hidden states become logits.

Legend: N tokens of the step, D decoding sequences, T tokens of each, R rows of logits, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openling.model.ling import Ling, SparseMoE
from openling.model.paged import PAGE, Chunk, PagedCache, PagedStore, RaggedBatch
from openling.ops.cpu import packed_linears
from openling.ops.rows import fix_linears
from openling.serve.graphs import DecodeGraphs
from openling.serve.ragged_graphs import RaggedGraphs
from openling.serve.scheduler import Plan, PromptChunk
from openling.serve.sequence import Sequence


@dataclass(frozen=True)
class Forward:
    """What a step computed: the batch, final hidden states [N, M], and where each sampled sequence's first row is in them.

    experts_NLk: on the host, the experts that each token chose in each sparse layer, if a request asked. logits_NV: where all
    tokens' are there already (graphs).
    """

    batch: RaggedBatch
    hidden_NM: Tensor
    first_rows: list[int]
    experts_NLk: Tensor | None = None
    logits_NV: Tensor | None = None


class Runner:
    """The model over pooled memory."""

    def __init__(self, model: Ling, store: PagedStore, *, invariant: bool = False) -> None:
        self.model, self.store, self.invariant = model, store, invariant
        if invariant:
            fix_linears(model)
        self.cache = PagedCache(store)
        self.device = store.device
        self.graphs: DecodeGraphs | None = None
        self.ragged_graphs: RaggedGraphs | None = None
        self._packed, self._stale = ExitStack(), True

    def pack(self) -> None:
        """On a CPU, lay weights out for single rows, where that pays; again after every change of them."""
        if self._stale and not self.invariant:
            self._packed.close()
            self._stale = self._packed.enter_context(packed_linears(self.model))

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Batch-invariant kernels inside the block, if this engine wants them."""
        if not self.invariant:
            yield
            return
        before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        settings: Any = torch.utils.deterministic
        fill = settings.fill_uninitialized_memory
        # Filling what is about to be written costs a launch per tensor and makes nothing repeatable here.
        settings.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn)
            settings.fill_uninitialized_memory = fill

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Forward:
        """One pass over the plan's tokens."""
        with self.mode():
            return self._forward(plan)

    def _forward(self, plan: Plan) -> Forward:
        wanted = any(s.request.params.routed_experts for s in (*plan.decodes, *(c.sequence for c in plan.chunks)))
        if self.graphs is not None and not plan.chunks and not wanted:
            batch, hidden_NM, logits_NV = self.graphs.run(plan.decodes, plan.new)
            return Forward(batch, hidden_NM, self._first_rows(plan), logits_NV=logits_NV)
        if self.ragged_graphs is not None and not wanted and self.ragged_graphs.serves(plan):
            return Forward(*self.ragged_graphs.run(plan, self.packed(plan)), self._first_rows(plan))
        batch = self.batch_of(plan)
        layers = [m for m in self.model.modules() if isinstance(m, SparseMoE)] if wanted else []
        for layer in layers:
            layer.chosen = []
        hidden_NM = self.backbone(batch)
        chosen = [x for layer in layers for x in layer.chosen or ()]
        for layer in layers:
            layer.chosen = None
        experts = torch.stack(chosen, dim=1).cpu() if chosen else None
        return Forward(batch, hidden_NM, self._first_rows(plan), experts)

    def backbone(self, batch: RaggedBatch) -> Tensor:
        """Final hidden states [N, M]."""
        self.cache.batch = batch
        out: Tensor = self.model.model(batch.ids, cache=self.cache)[0]
        return out

    def packed(self, plan: Plan) -> np.ndarray:
        """Ids, positions and page rows of the plan's tokens, drafts included, [3, N]."""
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for s in plan.decodes:
            tokens = [s.tokens[-1], *s.drafts[: plan.new - 1]]
            ids += tokens + [0] * (plan.new - len(tokens))
            positions += range(s.computed, s.computed + plan.new)
            rows += [s.pages[p // PAGE] * PAGE + p % PAGE for p in range(s.computed, s.computed + plan.new)]
        parts = [np.array((ids, positions, rows), dtype=np.int64).reshape(3, -1), *(_chunk_arrays(c) for c in plan.chunks)]
        return np.concatenate(parts, axis=1)

    def batch_of(self, plan: Plan) -> RaggedBatch:
        """The plan's tokens on the device."""
        packed = self.to_device(self.packed(plan))
        batch = RaggedBatch(packed[0][None], packed[1][None], packed[2])
        if plan.decodes:
            self.add_decodes(batch, plan.decodes, plan.new)
        if plan.chunks:
            bounds = np.cumsum([0, *(c.end - c.start for c in plan.chunks)], dtype=np.int32)
            batch.cu_seqlens = self.to_device(bounds)
            batch.chunk_slots = self.to_device(np.array([c.sequence.slot or 0 for c in plan.chunks], dtype=np.int64))
            batch.chunks = [
                Chunk(c.start, c.end, self.to_device(np.array(c.sequence.pages[: -(-c.end // PAGE)], dtype=np.int64)))
                for c in plan.chunks
            ]
        return batch

    def add_decodes(self, batch: RaggedBatch, sequences: Many[Sequence], new: int, *, ahead: int = 0) -> None:
        """Make the batch's first tokens those of decoding sequences: `new` each, `ahead` positions behind what is computed."""
        lengths = [s.computed + ahead + new for s in sequences]
        width = -(-max(lengths) // PAGE)
        batch.decodes, batch.new = len(sequences), new
        batch.slots = self.to_device(np.array([-1 if s.slot is None else s.slot for s in sequences], dtype=np.int64))
        batch.table = self.to_device(np.stack([s.table[:width] for s in sequences]))
        batch.lengths = self.to_device(np.array(lengths, dtype=np.int32))

    @staticmethod
    def _first_rows(plan: Plan) -> list[int]:
        """Where in the packed row each sampled sequence's rows begin."""
        rows = [i * plan.new for i in range(len(plan.decodes))]
        end = len(plan.decodes) * plan.new
        for chunk in plan.chunks:
            end += chunk.end - chunk.start
            if chunk.last:
                rows.append(end - 1)
        return rows

    def to_device(self, array: np.ndarray) -> Tensor:
        """A copy on the device, without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cpu":
            return tensor.clone()
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _chunk_arrays(chunk: PromptChunk) -> np.ndarray:
    """ids, positions and page rows of a chunk's tokens, [3, tokens]."""
    sequence = chunk.sequence
    positions = np.arange(chunk.start, chunk.end)
    rows = sequence.table[positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
    return np.stack((np.array(sequence.tokens[chunk.start : chunk.end], dtype=np.int64), positions, rows))
