"""Activation checkpointing: what a layer keeps for backward. Usable without a mesh.

    none        everything
    layer       a layer's input alone; its forward runs twice
    selective   the inputs of mixer and feed-forward part and the results of their matrix products and of attention; rotations,
                recurrences and activations are computed again, and so is all of a sparse layer: its share of tokens is not known
                beforehand, and its experts may be gathered by FSDP inside, which torch's selective form does not bear

Forwards are replaced on the objects, inside of FSDP's hooks. Tokens per expert are counted once. Kernels in Triton are no aten
operations: `selective` computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from openling.model.ling import MLP, Layer, Ling, SparseMoE

Recompute = Literal["none", "layer", "selective"]


def recompute(model: Ling, policy: Recompute) -> None:
    """Give every layer, hidden or MTP, this policy."""
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        if policy == "layer":
            _twice(layer, layer.mlp)
        elif policy == "selective":
            _twice(layer.attention, keep=True)
            _twice(layer.mlp, layer.mlp, keep=isinstance(layer.mlp, MLP))


def _twice(module: nn.Module, feed_forward: nn.Module | None = None, *, keep: bool = False) -> None:
    """Run a module's forward again in backward, except for what is kept of matrix products."""

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if keep:
            return create_selective_checkpoint_contexts(_keep)
        return nullcontext(), _uncounted(feed_forward)

    module.forward = partial(checkpoint, module.forward, use_reentrant=False, context_fn=contexts)


@contextmanager
def _uncounted(moe: nn.Module | None) -> Iterator[None]:
    """Tokens per expert stay as they are."""
    counted = moe.tokens_E if isinstance(moe, SparseMoE) else None
    try:
        yield
    finally:
        if isinstance(moe, SparseMoE):
            moe.tokens_E = counted


def _keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _products() else CheckpointPolicy.PREFER_RECOMPUTE


def _products() -> set[Any]:
    aten = torch.ops.aten
    return {
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
