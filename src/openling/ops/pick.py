"""Which form of an op runs: the Triton kernels on NVIDIA GPUs, the plain twins everywhere else.

Every op's entry asks `kernels_for` once per call. `OPENLING_KERNELS=plain` turns the kernels off for a whole process,
`plain_twins()` for a block; `kernels_reason()` says what runs and why, for a command to print.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
_plain_depth = 0


def kernels_for(x: Tensor) -> ModuleType | None:
    """`openling.ops.kernels` where it serves x: a half-precision tensor on a CUDA device; None where the plain twin must run."""
    if not x.is_cuda or x.dtype not in HALF or _plain_depth or _unavailable():
        return None
    from openling.ops import kernels

    return kernels


def batch_invariant() -> bool:
    """Whether a row's result must not depend on the rows around it, as RL needs between rollout and training.

    `torch.use_deterministic_algorithms(True)` asks for it. Kernels whose tiles or cuts follow the batch then take fixed ones.
    All of them repeat bit for bit on the same input in any mode.
    """
    return torch.are_deterministic_algorithms_enabled()


@contextmanager
def plain_twins() -> Iterator[None]:
    """Run plain twins inside this block, whatever the device: the reference side of tests and benchmarks."""
    global _plain_depth
    _plain_depth += 1
    try:
        yield
    finally:
        _plain_depth -= 1


def kernels_reason(device: torch.device | None = None) -> str:
    """One line for a person: which form of the ops runs on this device (by default the machine's GPU, if any), and why."""
    why = _unavailable() or (f"device {device}" if device is not None and device.type != "cuda" else None)
    if why:
        return f"plain PyTorch ops ({why})"
    return f"Triton kernels on {torch.cuda.get_device_name()}; plain PyTorch ops for FP32 and FP64 tensors"


@cache
def _unavailable() -> str | None:
    """Why the kernels cannot run in this process; None where they can."""
    if os.environ.get("OPENLING_KERNELS", "auto") == "plain":
        return "OPENLING_KERNELS=plain"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None
