"""Tensor parallelism: heads, columns and words are split; the residual stream is whole on every rank.

A block's input is `copy`-ed (its gradient summed), its last projection's output is summed: one all-reduce of [B, T, M] per mixer
and per feed-forward part, in either direction. Modules change their class for one that adds these sums and keep their names.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from openling.model.ling import MLP, GroupedQueryAttention, Layer, LightningAttention, Ling, SparseMoE
from openling.ops.lightning import log_decay_on
from openling.parallel.collectives import copy, total


class _Grouped:
    """A module that knows the ranks it is split over."""

    group: dist.ProcessGroup


class RowLinear(nn.Linear, _Grouped):
    """A product whose input columns are split: partial sums are added up, then the bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., part of in] to [..., out]."""
        out = total(F.linear(x, self.weight), self.group)
        return out if self.bias is None else out + self.bias


class WordEmbedding(nn.Embedding, _Grouped):
    """Embeddings of this rank's words; all others come as zeros, and the sum is the embedding."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] to [B, T, M]."""
        first = dist.get_rank(self.group) * self.weight.shape[0]
        local = input_ids - first
        mine = (local >= 0) & (local < self.weight.shape[0])
        found = F.embedding(local.where(mine, local.new_zeros(())), self.weight)
        return total(found.masked_fill(~mine[..., None], 0), self.group)


class SplitMLP(MLP, _Grouped):
    """A feed-forward part split by its inner columns."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., M] to [..., M]."""
        return super().forward(copy(x, self.group))


class SplitLightning(LightningAttention, _Grouped):
    """Lightning attention of this rank's heads, with their decays."""

    def log_decay(self, like: Tensor) -> Tensor:
        """FP32 [local heads]."""
        first = dist.get_rank(self.group) * self.heads
        return log_decay_on(like.device, *self.decay_of)[first : first + self.heads]


def split_over(model: Ling, group: dist.ProcessGroup) -> None:
    """Make the modules of a model work on parts: call it beside `take_parts`."""
    _become(model.model.word_embeddings, WordEmbedding, group)
    for module in model.model.layers:
        assert isinstance(module, Layer)
        _split_mixer(module.attention, group)
        feed_forward: Any = module.mlp
        if isinstance(feed_forward, SparseMoE):
            feed_forward = feed_forward.shared_experts if feed_forward.has_shared else None
        if feed_forward is not None:
            _become(feed_forward, SplitMLP, group)
            _become(feed_forward.down_proj, RowLinear, group)


def _split_mixer(mixer: Any, group: dist.ProcessGroup) -> None:
    ranks = dist.get_world_size(group)
    mixer.heads = mixer.heads // ranks
    if isinstance(mixer, GroupedQueryAttention):
        mixer.kv_heads //= ranks
    if isinstance(mixer, LightningAttention):
        mixer.g_norm.groups //= ranks
        _become(mixer, SplitLightning, group)
    dense = mixer.dense
    assert isinstance(dense, nn.Linear)
    _become(dense, RowLinear, group)
    mixer.register_forward_pre_hook(lambda _, given: (copy(given[0], group), *given[1:]))


def _become(module: Any, kind: type, group: dist.ProcessGroup) -> None:
    module.__class__ = kind
    module.group = group
