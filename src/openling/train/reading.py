"""What a training checkpoint holds, one rank or many having written it: tensors by name, read into whatever part is wanted.

Names are model/NAME, SLOT/NAME of the optimisers' state, rng/DEVICE or rng/DEVICE/RANK. One rank writes two safetensors files;
several write a DCP folder (`parallel.pieces`), of which each reads what it needs.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from openling.parallel.pieces import Piece, load
from openling.weights.dcp import METADATA, Reader


class Checkpoint(Protocol):
    """The tensors of a checkpoint, open for reading."""

    shapes: dict[str, torch.Size]

    def fill(self, wanted: dict[str, Tensor]) -> None:
        """Read into these tensors and pieces, in place; all names must be there, with these shapes."""
        ...

    def whole(self, name: str) -> Tensor:
        """A tensor of its own, on the CPU."""
        ...


def open_checkpoint(folder: Path) -> Checkpoint:
    """The tensors in a checkpoint's folder."""
    return _Sharded(folder) if (folder / METADATA).exists() else _Single(folder)


class _Sharded:
    """A DCP folder."""

    def __init__(self, folder: Path) -> None:
        self._reader = Reader(folder)
        described = self._reader.read_metadata().state_dict_metadata
        tensors = {name: d for name, d in described.items() if isinstance(d, TensorStorageMetadata)}
        self.shapes = {name: d.size for name, d in tensors.items()}
        self._dtypes = {name: d.properties.dtype for name, d in tensors.items()}

    def fill(self, wanted: dict[str, Tensor]) -> None:
        load(self._reader, wanted)

    def whole(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name], dtype=self._dtypes[name])
        load(self._reader, {name: tensor})
        return tensor


class _Single:
    """model.safetensors and optimizer.safetensors."""

    def __init__(self, folder: Path) -> None:
        self._files = {"model/": folder / "model.safetensors", "": folder / "optimizer.safetensors"}
        self.shapes: dict[str, torch.Size] = {}
        for prefix, path in self._files.items():
            with safe_open(path, "pt") as file:
                self.shapes |= {prefix + k: torch.Size(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118

    def fill(self, wanted: dict[str, Tensor]) -> None:
        with ExitStack() as stack:
            opened = {prefix: stack.enter_context(safe_open(path, "pt")) for prefix, path in self._files.items()}
            for name, tensor in wanted.items():
                prefix = "model/" if name.startswith("model/") else ""
                key = name.removeprefix(prefix)
                if not isinstance(tensor, Piece):
                    tensor.copy_(opened[prefix].get_tensor(key))
                    continue
                source = opened[prefix].get_slice(key)
                for chunk, view in tensor.blocks():
                    at = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
                    view.copy_(source[at])

    def whole(self, name: str) -> Tensor:
        prefix = "model/" if name.startswith("model/") else ""
        with safe_open(self._files[prefix], "pt") as file:
            return file.get_tensor(name.removeprefix(prefix))
