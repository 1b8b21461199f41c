"""A model whose routed experts multiply in FP8 while it is trained; `ops.fp8` says how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from openling.config.train import TrainConfig
from openling.errors import UserError
from openling.model.ling import Experts, Ling
from openling.ops.fp8 import check_fp8, fp8_experts


@contextmanager
def experts_in_fp8(model: Ling, config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Where the configuration asks for it; undone afterwards. Where it cannot be, a `UserError`."""
    if config.fp8_experts == "none":
        yield
        return
    c, form = model.config, config.fp8_experts
    if not c.moe_layers:
        raise UserError("the model has no routed experts", where="fp8_experts", value=form, expected="none")
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    for widths in {(c.moe_intermediate_size, c.hidden_size), *(tuple(m.gate_proj.shape[1:]) for m in experts)}:
        check_fp8(form, device, widths)  # a pipeline rank may have no experts, and must not go on alone
    before = [m.compute for m in experts]
    try:
        for m in experts:
            m.compute = partial(fp8_experts, form=form)
        yield
    finally:
        for m, compute in zip(experts, before, strict=True):
            m.compute = compute
