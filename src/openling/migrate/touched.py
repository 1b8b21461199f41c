"""Which parameters a stage changes, and what is stored."""

from __future__ import annotations

from pathlib import Path

import torch

from openling.config.migrate import Stage
from openling.errors import UserError
from openling.migrate.layout import kinds_of, next_stage
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.train.optim import select_parameters


def trainable(config: ModelConfig, stage: Stage, which: str, *, mtp: bool = False) -> list[str]:
    """Names of the parameters a warm-up changes, as regular expressions.

    linear-warmup: W_qkv and the QK-norms of Lightning layers (as published); `best` adds gate and group norm.
    mla-warmup: all attention parameters of the MLA layers; `mtp`, where the MTP loss has a weight, those of the MTP layers too.
    `attention`, in both: those of every layer.
    """
    kind = "lightning" if stage == "linear-warmup" else "mla"
    layers = [i for i, k in enumerate(config.layer_kinds) if k == kind]
    heads = config.num_nextn_predict_layers
    if mtp and not heads:
        raise UserError("the model has no MTP layer to train", where=f"stage {stage}: train.mtp", expected="0")
    if layers and mtp and config.mtp_layer_kind == kind:
        layers += range(config.num_hidden_layers, config.num_hidden_layers + heads)
    if not layers:
        raise UserError(
            f"there is no {kind} layer to warm up", where=f"stage {stage}", value=kinds_of(config), next=next_stage(config)
        )
    if which == "attention":
        return [r"model\.layers\.\d+\.attention\..*"]
    names = r"(query_key_value|query_layernorm|key_layernorm)\..*"
    if which == "best":
        names = r"(query_key_value|query_layernorm|key_layernorm|g_proj|g_norm)\..*"
    if kind == "mla":
        names = ".*"
    return [rf"model\.layers\.({'|'.join(map(str, layers))})\.attention\.{names}"]


def converted(before: ModelConfig, after: ModelConfig) -> list[str]:
    """Names of the parameters that a conversion makes anew, as regular expressions: mixers of layers that change kind."""
    count = after.num_hidden_layers + after.num_nextn_predict_layers
    layers = [i for i in range(count) if before.layer_kind(i) != after.layer_kind(i)]
    return [rf"model\.layers\.({'|'.join(map(str, layers))})\.attention\."] if layers else []


def values(model: Ling, patterns: list[str]) -> int:
    """How many values the parameters of these names hold."""
    return sum(p.numel() for p in select_parameters(model, patterns).values()) if patterns else 0


def stored_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@torch.no_grad()
def round_to(model: Ling, dtype: torch.dtype) -> None:
    """Give every weight the value that its file will hold, so that a resumed run goes on from the same model.

    A tensor that changes gets storage of its own: unchanged ones stay shared with the teacher.
    """
    for tensor in model.parameters():
        rounded = tensor.to(dtype).float()
        if not torch.equal(rounded, tensor):
            tensor.data = rounded
