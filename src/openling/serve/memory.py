"""How many pages and slots an engine gets."""

from __future__ import annotations

import logging

import torch

from openling.errors import UserError
from openling.model.ling import Ling
from openling.model.paged import PAGE, PagedStore, Sizes
from openling.serve.engine_config import EngineConfig

log = logging.getLogger("openling")
# Slots for cached states beside those of running sequences, as a share of these.
CACHED_STATES = 1.0
# Of the memory that is free on a GPU, and of a budget nobody named on a CPU.
GPU_SHARE = 0.8
CPU_BYTES = 1 << 30


def store_for(model: Ling, config: EngineConfig) -> tuple[int, PagedStore]:
    """The longest context that can run, and the memory for it; UserError if not even one page fits."""
    weight = model.lm_head.weight
    dtype, device = weight.dtype, weight.device
    drafts = config.drafts if model.model.mtp_layers() else 0
    sizes = Sizes.of(model.config, dtype, drafts)
    slots = config.slots or (config.max_running + max(1, int(CACHED_STATES * config.max_running)))
    fixed = (slots + 1) * sizes.slot + sizes.page  # with the slot and the page that are nobody's
    trained = model.config.max_position_embeddings
    length = config.max_model_len or trained
    if length > trained:
        raise UserError(
            "the model was not trained for contexts of this length", where="max_model_len", value=length,
            expected=f"at most {trained} tokens (max_position_embeddings)",
        )  # fmt: skip
    wanted = config.max_running * -(-(length + 2 * drafts) // PAGE)
    pages = config.pages
    if pages is None:
        left = (config.memory_bytes or _budget(device)) - fixed
        pages = min(wanted, max(0, left) // max(sizes.page, 1))
    if pages < 1:
        raise UserError(
            "the memory budget holds no page of context beside the states", where="memory_bytes",
            value=config.memory_bytes, expected=f"{fixed + sizes.page} bytes for {slots} slots, or fewer slots",
        )  # fmt: skip
    store = PagedStore(model.config, pages=pages, slots=slots, drafts=drafts, dtype=dtype, device=device)
    most = min(length, pages * PAGE - 2 * drafts)
    if most < length:
        log.warning(
            "memory for %d tokens of context, not the model's %d: a larger memory budget serves longer ones", most, length
        )
    return most, store


def _budget(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(GPU_SHARE * free)
