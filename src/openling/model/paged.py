"""The memory of many sequences at different positions: pooled pages (latents, keys and values) and slots (Lightning states).

A call runs one packed row of tokens [1, N]: first D sequences with `new` tokens each (decoding, or verifying drafts), then the
chunks of prompts. `PagedCache` is the `Memory` of such a call; who owns which page and slot is `serve.pool`'s business.

    pages   per MLA layer [P, 64, R + r], per GQA layer twice [P, 64, K, D]; page p of a sequence holds tokens 64 p .. 64 p + 63
    slots   [S, layers, H, D, D] in FP32 for all Lightning layers of a sequence, and rings of tokens that wait for their verdict

Page P and slot S are nobody's: what pads a CUDA graph's batch writes there. A padding decode has slot -1.

Legend: N tokens of the call, D decoding sequences, T = `new`, C chunks, P pages, S slots, X = H * D.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openling.model.config import ModelConfig
from openling.ops.attention import paged_absorbed_attention, paged_attention, softmax_attention
from openling.ops.lightning import lightning, log_decay_on
from openling.ops.lightning_decode import DecodeLayer, PendingTokens, PendingWindow, StatePool, commit, decode_step, verify_step
from openling.ops.pick import batch_invariant
from openling.ops.rope import apply_rope

PAGE = 64
# Where sequences are cut when their results must not depend on the batch.
INVARIANT_SPLIT = 4096


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. end - 1 of one sequence's prompt, and the pages (int64) that hold its first `end` tokens."""

    start: int
    end: int
    pages: Tensor


@dataclass
class RaggedBatch:
    """What one call computes, on the device. rows: where each token's page row is, counted over all pages.

    table and lengths (int32) and slots (int64) belong to the D decoding sequences; lengths count the new tokens. A slot of -1
    marks padding. cu_seqlens (int32) bounds the chunks behind the decoding tokens, chunk_slots are theirs.

    rowwise: the D = N rows of table and lengths are the tokens', for attention; the recurrence takes all of them as chunks.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    decodes: int = 0
    new: int = 1
    slots: Tensor | None = None
    table: Tensor | None = None
    lengths: Tensor | None = None
    chunks: list[Chunk] = field(default_factory=list)
    cu_seqlens: Tensor | None = None
    chunk_slots: Tensor | None = None
    rowwise: bool = False

    @property
    def split(self) -> int:
        """Tokens of the decoding sequences; those of the chunks follow."""
        return self.decodes * self.new


@dataclass(frozen=True)
class Sizes:
    """Bytes of one page and of one slot of a model, over all layers."""

    page: int
    slot: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, drafts: int) -> Sizes:
        """drafts: as in `PagedStore`."""
        kinds = _kinds(config, drafts)
        latent = (config.kv_lora_rank or 0) + (config.qk_rope_head_dim or 0)
        values = kinds.count("mla") * latent + kinds.count("gqa") * 2 * config.num_key_value_heads * config.head_dim
        heads, dim = config.num_attention_heads, config.head_dim
        state = heads * dim * dim * _wide(dtype).itemsize
        ring = 2 * heads * 2 * (drafts + 1) * dim * dtype.itemsize if drafts else 0
        return cls(PAGE * values * dtype.itemsize, kinds.count("lightning") * (state + ring))


class PagedStore:
    """The tensors. `drafts` > 0 makes room for so many unverified tokens behind each sequence, and for the MTP layers' rows."""

    def __init__(
        self, config: ModelConfig, *, pages: int, slots: int, drafts: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.pages, self.slots, self.drafts, self.device = config, pages, slots, drafts, device
        self.dtype, kinds = dtype, _kinds(config, drafts)
        self.lightning = {layer: i for i, layer in enumerate(i for i, kind in enumerate(kinds) if kind == "lightning")}
        self.window: PendingWindow | None = None
        self.pending: dict[int, PendingTokens] = {}
        self.rows: dict[int, Tensor] = {}
        self.restore()

    def restore(self) -> None:
        """Take the memory; nothing is in it."""
        c, device, dtype = self.config, self.device, self.dtype
        heads, dim, rows = c.num_attention_heads, c.head_dim, self.slots + 1 if self.lightning else 0
        self.states = torch.zeros(rows, len(self.lightning), heads, dim, dim, dtype=_wide(dtype), device=device)
        self.arrivals = torch.zeros(rows, heads, dtype=torch.int32, device=device)
        if self.drafts and self.lightning:
            self.window = PendingWindow.new(rows, room=self.drafts + 1, tokens=self.drafts + 1, device=device)
            self.pending = {i: PendingTokens.new(rows, heads, dim, self.window, dtype=dtype) for i in self.lightning}
        latent = (c.kv_lora_rank or 0) + (c.qk_rope_head_dim or 0)
        shapes = {"mla": (latent,), "gqa": (2 * c.num_key_value_heads, dim)}
        self.rows = {
            i: torch.zeros(self.pages + 1, PAGE, *shapes[kind], dtype=dtype, device=device)
            for i, kind in enumerate(_kinds(c, self.drafts))
            if kind in shapes
        }

    def release(self) -> None:
        """Give the memory back; `restore` before the next call."""
        self.states = self.arrivals = torch.empty(0)
        self.window, self.pending, self.rows = None, {}, {}

    @property
    def recurrent(self) -> bool:
        """Whether a sequence has a state besides its pages."""
        return bool(self.lightning)

    def state_pool(self, layer: int) -> StatePool:
        """One Lightning layer's states; the counters are zero between calls, so all layers share them."""
        return StatePool(self.states[:, self.lightning[layer]], self.arrivals)

    def clear_slot(self, slot: int) -> None:
        """A new sequence's: zero states, nothing waits."""
        self.states[slot] = 0
        if self.window is not None:
            self.window.count[slot] = 0

    def copy_slot(self, source: int, target: int, fold: int = 0) -> None:
        """Copy a state; the first `fold` of the tokens that wait in the source enter the copy, where none wait then."""
        self.states[target] = self.states[source]
        if self.window is None:
            return
        self.window.count[target] = fold
        if fold:
            self.window.start[target] = self.window.start[source]
            for ring in self.pending.values():
                ring.keys[target], ring.values[target] = ring.keys[source], ring.values[source]
            self.fold(torch.tensor([target], device=self.device))

    def fold(self, slots_B: Tensor) -> None:
        """What waits in these slots enters their states."""
        assert self.window is not None
        c = self.config
        for layer, ring in self.pending.items():
            decay = log_decay_on(self.device, c.num_attention_heads, layer, c.num_hidden_layers, c.lightning_decay_offset)
            rule = DecodeLayer(decay, None, None, decay, c.rms_norm_eps, c.group_norm_size)
            commit(rule, self.state_pool(layer), slots_B, ring, self.window)
        self.window.clear(slots_B)

    def poison_page(self, page: int) -> None:
        """Fill with NaN, so that a read of what was never written shows."""
        for rows in self.rows.values():
            rows[page] = float("nan")

    def poison_slot(self, slot: int) -> None:
        """As `poison_page`, for a slot that was given back."""
        self.states[slot] = float("nan")


def _kinds(config: ModelConfig, drafts: int) -> list[str]:
    """Mixers of the layers that remember: MTP layers too where they draft."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if drafts else 0)
    return [config.layer_kind(i) for i in range(layers)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class PagedCache:
    """`Memory` of one call at a time: set `batch`, then run the model on `batch.ids`."""

    def __init__(self, store: PagedStore) -> None:
        self.store = store
        self.batch: RaggedBatch | None = None
        layers = store.config.num_hidden_layers + store.config.num_nextn_predict_layers
        self.layers = [PagedLayer(self, i) for i in range(layers)]

    @property
    def now(self) -> RaggedBatch:
        """The call's batch."""
        assert self.batch is not None
        return self.batch

    def positions(self, input_ids_BT: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """As `Memory`."""
        return self.now.positions

    def extend_mask(self, mask_BT: Tensor | None, batch: int, tokens: int, device: torch.device) -> None:
        """Nothing is ever padding: sequences lie packed."""

    def advance(self, tokens: int) -> None:
        """Sequences are counted by whoever schedules them; only waiting tokens are counted here, after their verdict."""


@dataclass
class PagedLayer:
    """`LayerMemory` of one layer in the store."""

    cache: PagedCache
    layer: int

    def attend(self, q_1NHD: Tensor, k_1NKD: Tensor, v_1NKD: Tensor, scale: float, call: Any) -> Tensor:
        """As `LayerMemory`."""
        batch, heads = self.cache.now, k_1NKD.shape[2]
        pages = self._write(torch.cat((k_1NKD, v_1NKD), dim=2))
        parts = []
        if batch.decodes:
            q = q_1NHD[0, : batch.split].unflatten(0, (batch.decodes, batch.new))
            parts.append(_paged(q, pages[:, :, :heads], pages[:, :, heads:], batch, scale).flatten(0, 1)[None])
        for chunk, span in _spans(batch):
            rows = pages[chunk.pages].flatten(0, 1)[None, : chunk.end]
            parts.append(softmax_attention(q_1NHD[:, span], rows[:, :, :heads], rows[:, :, heads:], scale=scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def attend_latents(self, mixer: Any, q_1NHE: Tensor, latent_1NR: Tensor, k_rope_1Nr: Tensor, call: Any) -> Tensor:
        """As `LayerMemory`."""
        batch, rank = self.cache.now, latent_1NR.shape[-1]
        pages = self._write(torch.cat((latent_1NR, k_rope_1Nr.to(latent_1NR.dtype)), dim=-1))
        parts = []
        if batch.decodes:
            tables = call.part(slice(batch.split)).tables.latent
            q_nope, q_rope = q_1NHE[:, : batch.split].split((mixer.nope, mixer.rope), dim=-1)
            q_rope = apply_rope(q_rope, *tables, interleaved=True)
            q_nope, q_rope = (x[0].unflatten(0, (batch.decodes, batch.new)) for x in (q_nope, q_rope))
            assert batch.table is not None and batch.lengths is not None
            weight = mixer.kv_b_proj.weight.unflatten(0, (mixer.heads, -1))
            out = paged_absorbed_attention(
                q_nope, q_rope, pages, batch.table, batch.lengths, weight, mixer.nope,
                scale=mixer.scale, split_tokens=INVARIANT_SPLIT if batch_invariant() else 0,
            )  # fmt: skip
            parts.append(out.flatten(0, 1)[None])
        for chunk, span in _spans(batch):
            rows = pages[chunk.pages].flatten(0, 1)[None, : chunk.end]
            parts.append(mixer.read(q_1NHE[:, span], rows[..., :rank], rows[..., rank:], call.part(span)))
        return torch.cat(parts, dim=1)

    def recur(self, mixer: Any, qkv_1NX: Tensor, gate_1NX: Tensor, call: Any) -> Tensor:
        """As `LayerMemory`."""
        batch, store, parts = self.cache.now, self.cache.store, []
        decoding = 0 if batch.rowwise else batch.split
        if decoding:
            parts.append(self._step(mixer, qkv_1NX[0, :decoding], gate_1NX[0, :decoding], call)[None])
        if batch.chunk_slots is not None:
            rest, slots = slice(decoding, None), batch.chunk_slots
            q, k, v = mixer.split(qkv_1NX[:, rest], call.part(rest))
            states, decay = store.states[:, store.lightning[self.layer]], mixer.log_decay(q)
            before = states.index_select(0, slots)
            out, after = lightning(q, k, v, decay, initial_state=before, cu_seqlens=batch.cu_seqlens)
            states.index_copy_(0, slots, after)
            parts.append(mixer.gated(out.flatten(2), gate_1NX[:, rest]))
        return torch.cat(parts, dim=1)

    def _step(self, mixer: Any, qkv_NX: Tensor, gate_NX: Tensor, call: Any) -> Tensor:
        """The decoding sequences' tokens, [D * T, X]."""
        batch, store = self.cache.now, self.cache.store
        q_weight, k_weight = (mixer.query_layernorm.weight, mixer.key_layernorm.weight) if mixer.qk_norm else (None, None)
        norm = mixer.g_norm
        rule = DecodeLayer(mixer.log_decay(qkv_NX), q_weight, k_weight, norm.weight, mixer.eps, norm.groups, silu=mixer.silu)
        cos, sin = (x[0, : batch.split, 0] for x in call.tables.head)
        pool, slots = store.state_pool(self.layer), batch.slots
        assert slots is not None
        if batch.new == 1:
            return decode_step(qkv_NX, gate_NX, rule, pool, slots, cos, sin)
        assert store.window is not None
        qkv, gate, cos, sin = (x.unflatten(0, (batch.decodes, batch.new)) for x in (qkv_NX, gate_NX, cos, sin))
        return verify_step(qkv, gate, rule, pool, slots, store.pending[self.layer], store.window, cos, sin).flatten(0, 1)

    def _write(self, rows_1NX: Tensor) -> Tensor:
        """Puts new rows where the batch says; returns all pages."""
        pages = self.cache.store.rows[self.layer]
        flat, new = pages.flatten(0, 1), rows_1NX[0].to(pages.dtype)
        if pages.is_cuda:
            flat[self.cache.now.rows] = new
        else:  # of a few rows a third of the time
            flat.index_copy_(0, self.cache.now.rows, new)
        return pages


def _spans(batch: RaggedBatch) -> list[tuple[Chunk, slice]]:
    """Every chunk and its place in the packed row."""
    out, start = [], batch.split
    for chunk in batch.chunks:
        end = start + chunk.end - chunk.start
        out.append((chunk, slice(start, end)))
        start = end
    return out


def _paged(q_DTHD: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch, scale: float) -> Tensor:
    assert batch.table is not None and batch.lengths is not None
    return paged_attention(q_DTHD, keys, values, batch.table, batch.lengths, scale=scale)
