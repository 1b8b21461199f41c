"""What a model remembers between calls: FP32 states (Lightning), latents (MLA), keys and values (GQA).

Lightning's state has a fixed size; the rest grows by one row per token in buffers that double when full.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


class GrowingBuffer:
    """[B, S, ...] with amortised appends along S."""

    def __init__(self) -> None:
        self._data: Tensor | None = None
        self._length = 0

    def append(self, rows: Tensor) -> Tensor:
        """Add [B, T, ...] and return a view of all rows so far."""
        end = self._length + rows.shape[1]
        if self._data is None or end > self._data.shape[1]:
            capacity = max(end, 2 * self._length)
            grown = rows.new_empty((rows.shape[0], capacity, *rows.shape[2:]))
            if self._data is not None:
                grown[:, : self._length] = self._data[:, : self._length]
            self._data = grown
        self._data[:, self._length : end] = rows
        self._length = end
        return self._data[:, :end]

    def reorder(self, index_B: Tensor) -> None:
        """Pick batch rows (beam search, batch changes)."""
        if self._data is not None:
            self._data = self._data[index_B]

    def crop(self, length: int) -> None:
        """Forget rows from `length` on."""
        self._length = min(self._length, length)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use (not of the spare capacity)."""
        if self._data is None:
            return 0
        return self._data[:, : self._length].numel() * self._data.element_size()


@dataclass
class LayerCache:
    """One layer's memory; only the fields of its kind are used. `counting` is what a kernel needs besides the state."""

    state: Tensor | None = None
    counting: tuple[Tensor, Tensor] | None = None
    keys: GrowingBuffer = field(default_factory=GrowingBuffer)
    values: GrowingBuffer = field(default_factory=GrowingBuffer)

    def step_memory(self, state_BHDD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `lightning_step` updates and counts in: the state, int32 zeros [B, H], row numbers [B]."""
        batch, heads = state_BHDD.shape[:2]
        if self.counting is None or self.counting[1].shape[0] != batch:
            counters = torch.zeros(batch, heads, dtype=torch.int32, device=state_BHDD.device)
            self.counting = counters, torch.arange(batch, device=state_BHDD.device)
        self.state = state_BHDD.contiguous()
        return self.state, *self.counting

    @property
    def nbytes(self) -> int:
        """Bytes held for all sequences of the batch."""
        state = 0 if self.state is None else self.state.numel() * self.state.element_size()
        return state + self.keys.nbytes + self.values.nbytes


class Cache:
    """The memory of a whole model for one batch. `length` counts the tokens seen; `key_mask` marks real ones."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.length = 0
        self.key_mask: Tensor | None = None

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has now seen."""
        self.length += tokens

    def reorder(self, index_B: Tensor) -> None:
        """Pick batch rows in every layer."""
        for layer in self.layers:
            layer.state = None if layer.state is None else layer.state[index_B]
            layer.keys.reorder(index_B)
            layer.values.reorder(index_B)
        if self.key_mask is not None:
            self.key_mask = self.key_mask[index_B]

    def extend_mask(self, mask_BT: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """Mask of all keys after `tokens` more; None while no token has ever been padding."""
        if mask_BT is None and self.key_mask is None:
            return None
        old = self.key_mask if self.key_mask is not None else torch.ones(batch, self.length, dtype=torch.bool, device=device)
        new = mask_BT.bool() if mask_BT is not None else torch.ones(batch, tokens, dtype=torch.bool, device=device)
        self.key_mask = torch.cat((old, new), dim=1)
        return self.key_mask

    @property
    def nbytes(self) -> int:
        """Bytes held for the whole batch."""
        return sum(layer.nbytes for layer in self.layers)
