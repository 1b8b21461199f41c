"""Residual streams on disk between two layers: calibration costs the memory of one batch, and a killed walk goes on.

`FOLDER/next.json` names the layer in front of which the streams of `FOLDER/layer-N/` stand; it changes in one rename when all of
them are on disk, and older ones are removed then.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from openling.migrate.stack import Mapped
from openling.weights.files import write_shard
from openling.weights.io import TensorFiles
from openling.weights.whole import write_json


class DiskStreams:
    """`Streams` in a folder, which is made. check: raises where what the streams were made of is no longer what it was."""

    def __init__(self, folder: Path, device: torch.device, check: Callable[[], None] = lambda: None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device, self.check = folder, device, check

    def resume(self) -> tuple[int, list[Sequence[Tensor]]] | None:
        """The next layer and the streams in front of it."""
        path = self.folder / "next.json"
        if not path.exists():
            return None
        left = json.loads(path.read_text())
        return left["layer"], [self._read(left["streams"], k, count) for k, count in enumerate(left["batches"])]

    def keep(self, batches: Iterable[tuple[Tensor, ...]], layer: int | None) -> list[Sequence[Tensor]]:
        """Write the streams, one batch at a time."""
        name = "on-the-way" if layer is None else f"layer-{layer:05d}"
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        counts: list[int] = []
        for b, streams in enumerate(batches):
            for k, h in enumerate(streams):
                write_shard(folder / f"{k}-{b:05d}", {"h": h})
            counts = [b + 1] * len(streams)
        if layer is not None:
            self.check()
            write_json(self.folder / "next.json", {"layer": layer, "streams": name, "batches": counts})
            for old in self.folder.glob("*/"):
                if old.name != name:
                    shutil.rmtree(old)
        return [self._read(name, k, count) for k, count in enumerate(counts)]

    def _read(self, name: str, stream: int, count: int) -> Sequence[Tensor]:
        folder, device = self.folder / name, self.device
        return Mapped(range(count), lambda b: TensorFiles.of(folder, [f"{stream}-{b:05d}"]).read("h").to(device))


def noise(hidden_size: int, layer: int, *, batches: int, tokens: int, seed: int, device: torch.device) -> Sequence[Tensor]:
    """Normal inputs [1, tokens, M] in place of a residual stream: what an RMSNorm makes of them has unit second moments."""

    def draw(batch: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed + (layer << 20) + batch) % 2**63)
        return torch.randn(1, tokens, hidden_size, generator=generator).to(device)

    return Mapped(range(batches), draw)
