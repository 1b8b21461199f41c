"""Weights from outside: checked, exchanged between two steps, given to the host and taken back.

A change of weights makes all that was computed with the old ones stale. The engine forgets cached prefixes and states, and
running requests start again with the tokens they have.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from openling.errors import UserError, nearest
from openling.model.ling import Ling


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row-major, in hexadecimal."""
    raw = tensor.detach().to("cpu").contiguous().view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    return hashlib.sha256(raw.flatten().numpy().tobytes()).hexdigest()


def weights(model: Ling) -> dict[str, Tensor]:
    """Every weight and stored buffer by name; tied ones once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def checksum(model: Ling) -> str:
    """One SHA-256 over all names and weights, for two processes to compare."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights(model).items()):
        total.update(f"{name} {tensor_hash(tensor)}\n".encode())
    return total.hexdigest()


def get_weight(model: Ling, name: str) -> Tensor:
    """A copy on the host."""
    return _known(weights(model), name).detach().to("cpu", copy=True)


def exchange(model: Ling, tensors: Iterable[tuple[str, Tensor]], hashes: Mapping[str, str] | None) -> None:
    """Overwrite weights in place, all or none: UserError for a wrong name, shape, dtype or hash before the first is touched."""
    known = weights(model)
    given = list(tensors)
    twice = [name for name, count in Counter(name for name, _ in given).items() if count > 1]
    if twice:
        raise UserError("a weight came twice", where="name", value=twice[0], expected="each weight once")
    for name, tensor in given:
        _check(name, tensor, _known(known, name), None if hashes is None else hashes.get(name, "none"))
    with torch.no_grad():
        for name, tensor in given:
            known[name].copy_(tensor)


def _known(known: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in known:
        raise UserError("the model has no such weight", where="name", value=name, nearest=nearest(name, known))
    return known[name]


def _check(name: str, tensor: Tensor, own: Tensor, expected_hash: str | None) -> None:
    if tensor.shape != own.shape or tensor.dtype != own.dtype:
        raise UserError(
            "a weight does not fit", where=name, value=f"{tensor.dtype} {list(tensor.shape)}",
            expected=f"{own.dtype} {list(own.shape)}",
        )  # fmt: skip
    if expected_hash is not None and (found := tensor_hash(tensor)) != expected_hash:
        raise UserError("a weight arrived damaged", where=name, value=f"SHA-256 {found}", expected=f"SHA-256 {expected_hash}")
