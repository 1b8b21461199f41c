"""CUDA graphs of decoding and verifying steps, and of drafting: one launch instead of hundreds.

A graph is captured for each size of a ladder when it is first needed. It reads ids, positions, slots, page tables and lengths
from buffers that every step fills, so one graph serves all contexts; rows that pad a batch to its size have slot -1, length 0
and write to nobody's page. Nothing inside waits for the host. `ragged_graphs` captures small steps with prompts.

Legend: B sequences of a size, T tokens of each, N = B T, M model width, V vocabulary, K drafts, W pages of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from openling.model.capture import Capture, Replay
from openling.model.paged import PAGE, RaggedBatch
from openling.serve.sequence import Sequence

if TYPE_CHECKING:
    from openling.serve.runner import Runner


def ladder(most: int) -> list[int]:
    """Batch sizes with a graph: powers of two and what lies half way, up to `most`."""
    sizes = {1, 2, 3, most} | {n for e in range(2, most.bit_length() + 1) for n in (1 << e, 3 << (e - 1)) if n <= most}
    return sorted(n for n in sizes if n <= most)


class Mirror:
    """A buffer on the device and its host side; `send` copies the first rows without waiting."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.device = torch.zeros(shape, dtype=dtype, device=device)
        host = torch.zeros(shape, dtype=dtype)
        self._host = host.pin_memory() if device.type == "cuda" else host
        self.host: np.ndarray = self._host.numpy()

    def send(self, rows: int) -> None:
        """Copy host[:rows]; the host side may be written again once the device has been waited for."""
        self.device[:rows].copy_(self._host[:rows], non_blocking=True)


@dataclass
class _Buffers:
    """What the graphs of one T read. tokens: ids, positions and page rows side by side, [N, 3]."""

    tokens: Mirror
    slots: Mirror
    lengths: Mirror
    table: Mirror


class DecodeGraphs:
    """Steps in which every sequence decodes. most: sequences; width: pages of a table."""

    def __init__(self, runner: Runner, *, most: int, width: int, capture: Capture) -> None:
        self.runner, self.most, self.width, self.capture = runner, most, width, capture
        self.sizes = ladder(most)
        self._buffers: dict[int, _Buffers] = {}
        self._hidden: dict[int, Tensor] = {}
        self._graphs: dict[tuple[int, int], Replay] = {}

    def size_of(self, count: int) -> int:
        """The smallest captured batch for so many sequences."""
        return next(size for size in self.sizes if size >= count)

    def run(self, sequences: list[Sequence], new: int) -> tuple[RaggedBatch, Tensor, Tensor]:
        """The batch, final hidden states [N, M] and logits [N, V] of these sequences; valid until the next step."""
        size = self.size_of(len(sequences))
        graph = self._graph(size, new)
        self._fill(self._buffers_of(new), sequences, new, size)
        logits_NV: Tensor = graph()
        real = len(sequences) * new
        return self.batch(len(sequences), new), self._hidden[new][:real], logits_NV[:real]

    def warm_up(self, new: int) -> int:
        """Capture every size with so many tokens of each sequence; returns how many there are. The largest sets the memory."""
        for size in reversed(self.sizes):
            self._graph(size, new)
        return len(self.sizes)

    def _graph(self, size: int, new: int) -> Replay:
        if (size, new) not in self._graphs:
            # A capture runs the step: on padding alone, since a state must not take a token twice.
            self._fill(self._buffers_of(new), [], new, size)
            self._graphs[size, new] = self.capture(lambda: self._step(size, new))
        return self._graphs[size, new]

    def batch(self, size: int, new: int) -> RaggedBatch:
        """The buffers as a batch of so many sequences."""
        buffers = self._buffers_of(new)
        ids, positions, rows = buffers.tokens.device[: size * new].unbind(1)
        return RaggedBatch(
            ids[None], positions[None], rows, size, new,
            buffers.slots.device[:size], buffers.table.device[:size], buffers.lengths.device[:size],
        )  # fmt: skip

    def hidden(self, size: int, new: int) -> Tensor:
        """Where the last step left its hidden states, padding included, [N, M]."""
        return self._hidden[new][: size * new]

    def _step(self, size: int, new: int) -> Tensor:
        h_NM = self.runner.backbone(self.batch(size, new))
        self.hidden(size, new).copy_(h_NM)
        return self.runner.model.logits(h_NM)

    def _buffers_of(self, new: int) -> _Buffers:
        if new not in self._buffers:
            device, width = self.runner.device, self.runner.model.config.hidden_size
            self._buffers[new] = _Buffers(
                Mirror((self.most * new, 3), torch.int64, device),
                Mirror((self.most,), torch.int64, device),
                Mirror((self.most,), torch.int32, device),
                Mirror((self.most, self.width), torch.int32, device),
            )
            dtype = self.runner.model.lm_head.weight.dtype
            self._hidden[new] = torch.zeros(self.most * new, width, dtype=dtype, device=device)
        return self._buffers[new]

    def _fill(self, buffers: _Buffers, sequences: list[Sequence], new: int, size: int) -> None:
        """This step's sequences, then padding up to `size`."""
        count = len(sequences)
        first = np.array([s.computed for s in sequences], dtype=np.int64)
        tokens = buffers.tokens.host[: size * new].reshape(size, new, 3)
        tokens[:, :, 0] = 0
        for i, s in enumerate(sequences):
            tokens[i, 0, 0] = s.tokens[-1]
            drafts = s.drafts[: new - 1]
            tokens[i, 1 : 1 + len(drafts), 0] = drafts
            buffers.table.host[i, : len(s.pages)] = s.table[: len(s.pages)]
        positions = first[:, None] + np.arange(new)
        pages = np.take_along_axis(buffers.table.host[:count], positions // PAGE, axis=1).astype(np.int64)
        tokens[:count, :, 1] = positions
        tokens[:count, :, 2] = pages * PAGE + positions % PAGE
        tokens[count:, :, 1] = 0
        tokens[count:, :, 2] = self.runner.store.pages * PAGE
        buffers.slots.host[:count] = [-1 if s.slot is None else s.slot for s in sequences]
        buffers.slots.host[count:size] = -1
        buffers.lengths.host[:count] = first + new
        buffers.lengths.host[count:size] = 0
        for mirror, rows in ((buffers.tokens, size * new), (buffers.slots, size), (buffers.lengths, size), (buffers.table, size)):
            mirror.send(rows)
