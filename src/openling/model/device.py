"""Where to run."""

from __future__ import annotations

import torch

from openling.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a GPU and the CPU elsewhere; any other name is taken as it is, if it is usable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"this device cannot be used: {first}", where="--device", value=name, expected="auto, cpu or cuda"
        ) from error
    return device
