"""Which parameters train, and the optimisers over them."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor, nn

from openling.config.train import TrainConfig
from openling.errors import UserError, nearest
from openling.parallel.matrices import Matrix
from openling.train.muon import Muon

# Regular expressions, any of which is found in the name; or a function of the name.
ParameterChoice = Sequence[str] | Callable[[str], bool]


def select_names(names: Sequence[str], choice: ParameterChoice, where: str = "trainable parameters") -> list[str]:
    """Those chosen, in their order; an expression that finds none, or is none, is a `UserError`."""
    if callable(choice):
        chosen = [name for name in names if choice(name)]
    else:
        for pattern in choice:
            try:
                found = any(re.search(pattern, name) for name in names)
            except re.error as error:
                what = f"this is no regular expression: {error}"
                raise UserError(what, where=where, value=pattern, expected="one that is found in parameters' names") from error
            if not found:
                raise UserError(
                    "no parameter has this name",
                    where=where,
                    value=pattern,
                    expected="an expression found in a parameter's name",
                    nearest=nearest(pattern, names),
                )
        chosen = [name for name in names if any(re.search(pattern, name) for pattern in choice)]
    if not chosen:
        raise UserError("no parameter is chosen for training", where=where, expected="at least one")
    return chosen


def select_parameters(model: nn.Module, choice: ParameterChoice) -> dict[str, nn.Parameter]:
    """The chosen parameters of a model by name."""
    named = dict(model.named_parameters())
    return {name: named[name] for name in select_names(list(named), choice)}


def in_muon(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and stacked experts inside of layers; embeddings, head, router and vectors stay with AdamW."""
    return parameter.dim() >= 2 and ".layers." in name and not name.endswith("mlp.gate.weight")


class Optimizers:
    """AdamW, or Muon with AdamW on the rest, over named parameters; all of them at one learning rate."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], config: TrainConfig, matrices: dict[nn.Parameter, Matrix] | None = None
    ) -> None:
        """matrices: of parameters that ranks hold in parts, for Muon. A part may be empty; AdamW does not see those."""
        self.parameters = parameters
        muon = {name for name, p in parameters.items() if config.optimizer == "muon" and in_muon(name, p)}
        rest = [p for name, p in parameters.items() if name not in muon and p.numel()]
        self.each: list[torch.optim.Optimizer] = [adamw(rest, config)] if rest else []
        if muon:
            chosen = [parameters[name] for name in parameters if name in muon]
            decay, momentum = config.weight_decay, config.momentum
            self.each.append(Muon(chosen, config.lr, momentum=momentum, weight_decay=decay, matrices=matrices))

    def step(self, lr: float) -> None:
        """One update at this rate; gradients are gone afterwards."""
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters.values():
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The state as SLOT/NAME: exp_avg, exp_avg_sq and step of AdamW, momentum_buffer of Muon."""
        owners = {p: optimizer for optimizer in self.each for group in optimizer.param_groups for p in group["params"]}
        return {
            f"{slot}/{name}": value
            for name, p in self.parameters.items()
            if p.numel()
            for slot, value in owners[p].state.get(p, {}).items()
        }

    def adopt(self, names: Container[str]) -> dict[str, Tensor]:
        """State for whatever is among these names, SLOT/NAME, as tensors to be filled in place."""
        own = {p: name for name, p in self.parameters.items()}
        found: dict[str, Tensor] = {}
        for optimizer in self.each:
            slots = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                held = [slot for slot in slots if f"{slot}/{own[p]}" in names]
                if held and p.numel():
                    one = torch.zeros((), device=p.device)
                    optimizer.state[p] = {slot: one if slot == "step" else torch.zeros_like(p) for slot in held}
                    found |= {f"{slot}/{own[p]}": value for slot, value in optimizer.state[p].items()}
        return found


def adamw(parameters: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW with FP32 state; weight decay on matrices alone (norm weights and biases would shrink for no gain)."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
