"""Context parallelism: rows cut into contiguous slices, one per rank, and a memory through which mixers see the other slices.

To a mixer it is a `LayerMemory` like a cache, so the model has no second forward pass. Lightning layers exchange states
(`ops.context_parallel`), MLA layers gather latents and rotated rows (R + r values a token), GQA layers keys and values; then each
rank attends from its own tokens. Later ranks have more keys to read in softmax layers; Lightning layers are even.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openling.errors import UserError
from openling.model.cache import consecutive_positions
from openling.model.ling import CallContext, LatentAttention, LightningAttention
from openling.ops.attention import softmax_attention
from openling.ops.context_parallel import ContextSlice, context_slice, lightning_context_parallel
from openling.parallel.collectives import joined


@dataclass(frozen=True)
class Slice:
    """What a context rank holds of rows [B, S] that all ranks of the group know: T consecutive tokens of each."""

    shape: tuple[int, int]
    cu_seqlens: Tensor | None
    """Bounds of the documents of a packed row, on the CPU."""
    bounds: list[int]
    rank: int
    group: dist.ProcessGroup

    @property
    def mine(self) -> slice:
        """This rank's tokens of a row."""
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    def memory(self, device: torch.device | str) -> ContextMemory:
        """What the model is called with as its cache, for every pass over these tokens."""
        return ContextMemory(self, device)


def slice_of(shape: tuple[int, int], cu_seqlens: Tensor | None, group: dist.ProcessGroup) -> Slice:
    """This rank's slice of rows of that shape. cu_seqlens [N + 1]: the documents of a packed row.

    A `UserError` where rows have fewer tokens than there are ranks, or packed documents come in several rows.
    """
    (rows, tokens), ranks = shape, dist.get_world_size(group)
    if tokens < ranks:
        raise UserError("rows are shorter than there are ranks", where="context", value=ranks, expected=f"at most {tokens}")
    if cu_seqlens is not None and rows != 1:
        raise UserError("packed documents come as one row", where="rows", value=rows, expected=1)
    bounds = [tokens * r // ranks for r in range(ranks + 1)]
    return Slice(shape, cu_seqlens, bounds, dist.get_rank(group), group)


class ContextMemory:
    """A `Memory` of slices: nothing is kept between calls, other ranks' tokens are."""

    def __init__(self, part: Slice, device: torch.device | str) -> None:
        self.held = context_slice(part.bounds, part.rank, cu_seqlens=part.cu_seqlens, device=device)
        self.bounds, self.group = part.bounds, part.group
        positions_1T = consecutive_positions(torch.empty(1, part.shape[1]), 0, part.cu_seqlens)[:, part.mine]
        self.positions_1T = positions_1T.to(device, non_blocking=True)
        self.earlier = int(positions_1T[0, 0])
        """Tokens on earlier ranks that the first local piece goes on from."""
        self.layers = _SameForAll(SlicedLayer(self))

    def positions(self, input_ids_BT: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Where the local tokens stand in their documents, [1, T]."""
        return self.positions_1T

    def extend_mask(self, mask_BT: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """None: slices have no padding."""
        if mask_BT is not None:
            raise ValueError("context parallel rows have no padding")
        return None

    def advance(self, tokens: int) -> None:
        """Nothing is counted."""

    def whole(self, x_BT: Tensor) -> Tensor:
        """All tokens of the rows, from the local ones."""
        return joined(x_BT, self.bounds, self.group)

    def attend(self, run: Callable[[slice, slice, Tensor | None], Tensor]) -> Tensor:
        """`run(queries, keys, cu_seqlens)` for the local tokens, [B, T, ...]: the first document with its old keys, then more.

        queries are local indices, keys indices into whole rows, cu_seqlens the bounds of packed documents among both.
        """
        held, first, tokens = self.held, self.held.first_tokens, self.held.end - self.held.start
        if held.cu_seqlens is None:
            return run(slice(0, tokens), slice(0, held.end), None)
        if not self.earlier:
            return run(slice(0, tokens), slice(held.start, held.end), held.cu_seqlens)
        out = run(slice(0, first), slice(held.start - self.earlier, held.start + first), None)
        if first == tokens:
            return out
        others = run(slice(first, tokens), slice(held.start + first, held.end), held.cu_seqlens[1:] - first)
        return torch.cat((out, others), dim=1)


@dataclass(frozen=True)
class _SameForAll(Sequence[Any]):
    """One object for every layer."""

    layer: SlicedLayer

    def __getitem__(self, index: Any) -> Any:
        return self.layer

    def __len__(self) -> int:
        raise TypeError("there is one for every layer")


class SlicedLayer:
    """A `LayerMemory` that sees other ranks' slices."""

    def __init__(self, memory: ContextMemory) -> None:
        self.memory = memory

    def attend(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, scale: float, call: Any) -> Tensor:
        """Gathers keys and values in one collective."""
        width = k_BTKD.shape[-1]
        kv = self.memory.whole(torch.cat((k_BTKD, v_BTKD), dim=-1))

        def run(queries: slice, keys: slice, cu_seqlens: Tensor | None) -> Tensor:
            k, v = kv[:, keys].split((width, kv.shape[-1] - width), dim=-1)
            return softmax_attention(q_BTHD[:, queries], k, v, scale=scale, cu_seqlens=cu_seqlens)

        return self.memory.attend(run)

    def attend_latents(
        self, mixer: LatentAttention, q_BTHE: Tensor, latent_BTR: Tensor, k_rope_BTr: Tensor, call: CallContext
    ) -> Tensor:
        """Gathers latents and rotated rows in one collective; keys and values are made of them here."""
        rows = self.memory.whole(torch.cat((latent_BTR, k_rope_BTr.to(latent_BTR.dtype)), dim=-1))

        def run(queries: slice, keys: slice, cu_seqlens: Tensor | None) -> Tensor:
            latent, k_rope = rows[:, keys].split((mixer.rank, mixer.rope), dim=-1)
            here = call.part(queries)
            here.cu_seqlens = cu_seqlens
            return mixer.expanded(q_BTHE[:, queries], latent, k_rope, here)

        return self.memory.attend(run)

    def recur(self, mixer: LightningAttention, qkv_BTX: Tensor, gate_BTX: Tensor, call: CallContext) -> Tensor:
        """Exchanges states beside or before the local attention."""
        held: ContextSlice = self.memory.held
        q, k, v = mixer.split(qkv_BTX, call)
        decay = mixer.log_decay(qkv_BTX)
        out, _ = lightning_context_parallel(q, k, v, decay, held, group=self.memory.group)
        return mixer.gated(out.flatten(2), gate_BTX)
