"""Weights for a model that was put onto a mesh on "meta": each rank's memory holds its parts and one whole tensor at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openling.parallel.apply import Parallel
from openling.parallel.pieces import Piece, pieces


@torch.no_grad()
def give_memory(parallel: Parallel, device: torch.device) -> None:
    """Parts on the device, with any values; a tied head stays tied."""
    model = parallel.model
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.word_embeddings.weight


@torch.no_grad()
def fill(parallel: Parallel, whole: Callable[[str, torch.Size], Tensor]) -> None:
    """Every parameter and buffer from `whole(name, shape)`, called in the order of the whole model's parameters, then buffers."""
    held = parallel.held(dict(parallel.model.named_parameters()))
    everything: dict[str, Tensor] = {**held, **dict(parallel.model.named_buffers())}
    for key, mine in pieces(parallel, {f"model/{name}": tensor.detach() for name, tensor in everything.items()}).items():
        value = whole(key.removeprefix("model/"), mine.shape)
        if not isinstance(mine, Piece):
            mine.copy_(value)
            continue
        for chunk, view in mine.blocks():
            view.copy_(value[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))])
