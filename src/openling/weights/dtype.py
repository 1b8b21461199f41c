"""In which dtype a folder's weights are computed: `--dtype` of the verbs that run a model.

auto keeps the stored dtype on a GPU. A CPU without BF16 units multiplies BF16 matrices slower than FP32 ones, so there the
self-test of `ops/cpu.py` decides, as long as the wider copy fits the memory that is free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from openling.ops.cpu import matmul_dtype
from openling.weights.folder import Loaded, Opened, load, open_folder

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# What caches, activations and the system keep of the free memory.
ROOM = 0.8


@dataclass(frozen=True)
class Choice:
    """A dtype, the one that is stored, and why they differ or had to agree ("" where there is nothing to say)."""

    dtype: torch.dtype
    stored: torch.dtype
    why: str

    def __str__(self) -> str:
        if self.dtype == self.stored:
            return _name(self.dtype) + (f" ({self.why})" if self.why else "")
        return f"{_name(self.stored)} in the folder, computed in {_name(self.dtype)} ({self.why})"


def pick_dtype(name: str, opened: Opened, device: torch.device) -> Choice:
    """The dtype that `load` shall give the weights of an opened folder."""
    stored = opened.stored
    if name != "auto":
        return Choice(DTYPES[name], stored, f"--dtype {name}")
    fast = matmul_dtype(stored) if device.type == "cpu" else stored
    bytes = fast.itemsize * sum(math.prod(opened.shapes[weight]) for weight in opened.bindings)
    if fast.itemsize > stored.itemsize and bytes > ROOM * psutil.virtual_memory().available:
        return Choice(stored, stored, f"{_name(fast)} would be faster on this CPU, but its {bytes / 2**30:.1f} GiB do not fit")
    keep = f"; --dtype {_name(stored)} keeps it" if stored in DTYPES.values() else ""
    return Choice(fast, stored, f"faster on this CPU{keep}" if fast != stored else "")


def load_computed(folder: str | Path, *, dtype: str, device: torch.device) -> tuple[Loaded, Choice]:
    """A checkpoint folder in the dtype that `--dtype` means on this device, and what to say about it."""
    opened = open_folder(folder)
    choice = pick_dtype(dtype, opened, device)
    return load(opened, dtype=choice.dtype, device=device), choice


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
