"""What a model remembers between calls: FP32 states (Lightning), latents (MLA), keys and values (GQA).

A mixer hands its new rows to a `LayerMemory` and gets back what its output projection takes; whether sequences lie in dense
buffers (`Cache`, below) or in pooled pages and slots (`model.paged`) is not its business. In the dense form Lightning's state
has a fixed size; the rest grows by one row per token in buffers that double when full.

Legend: B batch, T new tokens, S cached and new tokens, H heads, K key/value heads, D head dim, R latent rank, r rotated dims,
E = query width of MLA, V value width, X = H * D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from openling.ops.attention import softmax_attention
from openling.ops.fused import decode_kernels, lightning_step
from openling.ops.lightning import lightning


class LayerMemory(Protocol):
    """One layer's memory; `call` is the model's CallContext, a mixer the layer's own."""

    def attend(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, scale: float, call: Any) -> Tensor:
        """Remember new keys and values; causal attention of the new queries over all of them, [B, T, H, D]."""

    def attend_latents(self, mixer: Any, q_BTHE: Tensor, latent_BTR: Tensor, k_rope_BTr: Tensor, call: Any) -> Tensor:
        """Remember new latents and rotated rows; attention of an MLA layer over all of them, [B, T, H, V]."""

    def recur(self, mixer: Any, qkv_BTX: Tensor, gate_BTX: Tensor, call: Any) -> Tensor:
        """Advance the states of a Lightning layer; its output after norm and gate, [B, T, X]."""


class Memory(Protocol):
    """The memory of a whole model for the sequences of one call."""

    @property
    def layers(self) -> Sequence[LayerMemory]:
        """One per hidden layer."""

    def positions(self, input_ids_BT: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Where the new tokens stand in their sequences, [1 or B, T]."""

    def extend_mask(self, mask_BT: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """Mask of all keys after the new ones; None where nothing is padding."""

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has now seen."""


def consecutive_positions(input_ids_BT: Tensor, start: int, cu_seqlens: Tensor | None) -> Tensor:
    """start, start + 1, ..., [1, T]; counted anew in every packed document."""
    device = input_ids_BT.device
    positions = torch.arange(start, start + input_ids_BT.shape[1], device=device)
    if cu_seqlens is not None:
        lengths = cu_seqlens.to(device).diff()
        positions = positions - torch.repeat_interleave(cu_seqlens.to(device)[:-1], lengths)
    return positions[None]


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

    def attend(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, scale: float, call: Any) -> Tensor:
        """As `LayerMemory`."""
        k, v = self.keys.append(k_BTKD), self.values.append(v_BTKD)
        return softmax_attention(q_BTHD, k, v, scale=scale, cu_seqlens=call.cu_seqlens, key_mask=call.key_mask)

    def attend_latents(self, mixer: Any, q_BTHE: Tensor, latent_BTR: Tensor, k_rope_BTr: Tensor, call: Any) -> Tensor:
        """As `LayerMemory`."""
        out: Tensor = mixer.read(q_BTHE, self.keys.append(latent_BTR), self.values.append(k_rope_BTr), call)
        return out

    def recur(self, mixer: Any, qkv_BTX: Tensor, gate_BTX: Tensor, call: Any) -> Tensor:
        """As `LayerMemory`; one new token takes the kernel for that, where there is one."""
        norm, decay = mixer.g_norm, mixer.log_decay(qkv_BTX)
        if self.state is not None and qkv_BTX.shape[1] == 1 and not torch.is_grad_enabled():
            fast = decode_kernels(qkv_BTX, mixer.heads, mixer.dim, norm.groups)
            if fast is not None:
                qkv, gate, memory = qkv_BTX[:, 0], gate_BTX[:, 0], self.step_memory(self.state)
                if call.key_mask is not None:
                    qkv[:, -gate.shape[1] :] *= call.key_mask[:, -1:]
                norms = (mixer.query_layernorm.weight, mixer.key_layernorm.weight) if mixer.qk_norm else None
                return lightning_step(
                    fast, qkv, gate, norms, call.tables.head, decay, norm.weight, memory,
                    eps=mixer.eps, groups=norm.groups, silu=mixer.silu,
                )[:, None]  # fmt: skip
        q, k, v = mixer.split(qkv_BTX, call)
        out, self.state = lightning(q, k, v, decay, initial_state=self.state, cu_seqlens=call.cu_seqlens)
        gated: Tensor = mixer.gated(out.flatten(2), gate_BTX)
        return gated

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

    def positions(self, input_ids_BT: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Where the new tokens stand, [1, T]."""
        return consecutive_positions(input_ids_BT, self.length, cu_seqlens)

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
