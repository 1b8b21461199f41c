"""What a conversion would do, from the headers alone: bytes by class of tensor, by what becomes of them, memory, disk time."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openling.config.migrate import MigrateConfig
from openling.migrate.memory import BUDGET, fit_bytes, peak_bytes, together
from openling.migrate.stream import AHEAD_BYTES, Outline, outline
from openling.weights.linked import Mode

PROBE_BYTES = 64 << 20


@dataclass(frozen=True)
class ClassRow:
    """Tensors of one kind: how many, stored bytes, and what becomes of them."""

    name: str
    tensors: int
    bytes: int
    becomes: str


@dataclass(frozen=True)
class Estimate:
    """What would be done. Bytes are of files; `seconds` is disk time alone, at `disk_rate` bytes per second."""

    rows: list[ClassRow]
    linked: int
    copied: int
    written: int
    read_for_fits: int
    peak_memory: int
    disk_rate: float

    @property
    def seconds(self) -> float:
        """Disk time of what is copied and written."""
        return (self.copied + self.written) / self.disk_rate

    def as_dict(self) -> dict[str, Any]:
        """For other programs."""
        return {name: getattr(self, name) for name in ("linked", "copied", "written", "read_for_fits", "peak_memory", "seconds")}


def estimate(
    source: Path,
    config: MigrateConfig,
    mode: Mode,
    *,
    beside: Path,
    batches: list[int] | None,
    memory: int = BUDGET,
) -> Estimate:
    """Plan a conversion of `source`. `beside`: an existing folder on the output's disk, whose rate is measured with a file
    of 64 MiB that is removed; batches: the tokens of each batch of calibration text (None: from weights only); memory: the
    budget in bytes. Raises UserError as the conversion itself would."""
    plan = outline(source, config, mode)
    return Estimate(
        rows=_rows(plan),
        linked=sum(f.bytes for f in plan.files if f.action == "link"),
        copied=sum(f.bytes for f in plan.files if f.action != "link"),
        written=plan.new_bytes(),
        read_for_fits=plan.attention_bytes() if batches is None else _read(plan, batches, memory),
        peak_memory=peak_bytes(plan, batches, memory) if batches else fit_bytes(plan, config.text.sequence_length),
        disk_rate=disk_rate(beside),
    )


def _read(plan: Outline, batches: list[int], memory: int) -> int:
    """Every stage reads what is no expert once, and experts once for all batches that go through them together."""
    experts = [b for b in plan.opened.bindings.values() if ".mlp.experts." in b.ours]
    once = sum(plan.raw.nbytes(name) for binding in experts for name in binding.theirs)
    times = math.ceil(len(batches) / together(plan, batches, memory))
    return len(plan.steps) * (plan.raw.total_bytes + once * (times - 1))


def _rows(plan: Outline) -> list[ClassRow]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for binding in plan.opened.bindings.values():
        key = _class(binding.ours), _becomes(plan, binding.ours)
        count, size = found.get(key, (0, 0))
        found[key] = count + len(binding.theirs), size + sum(plan.raw.nbytes(name) for name in binding.theirs)
    return [ClassRow(name, count, size, becomes) for (name, becomes), (count, size) in sorted(found.items())]


def _class(ours: str) -> str:
    parts = {".attention.": "attention", ".mlp.experts.": "routed experts", ".shared_experts.": "shared experts"}
    parts |= {".mlp.gate.": "routers", ".mlp.": "dense feed-forward", "norm": "norms"}
    return next((name for part, name in parts.items() if part in ours), "embeddings and heads")


def _becomes(plan: Outline, ours: str) -> str:
    if ".attention." not in ours:
        return "kept"
    layer = int(ours.split(".")[2])
    return plan.target.layer_kind(layer) if layer in plan.layers else "kept"


def disk_rate(folder: Path) -> float:
    """Bytes per second of a plain sequential write of 64 MiB to the disk."""
    data, begun = os.urandom(1 << 20), time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(PROBE_BYTES >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return PROBE_BYTES / (time.perf_counter() - begun)


def say(found: Estimate, *, streamed: bool, total_bytes: int) -> str:
    """The estimate in words, for a terminal."""
    width = max(len(row.name) for row in found.rows)
    lines = [f"{row.name:<{width}} {row.tensors:>9,} tensors {row.bytes / 1e9:>11.3f} GB  {row.becomes}" for row in found.rows]
    gb = {name: f"{value / 1e9:.3f} GB" for name, value in found.as_dict().items()}
    lines += ["", f"new attention written: {gb['written']}; kept tensors copied: {gb['copied']}; linked: {gb['linked']}"]
    lines += [f"read for the fits: {gb['read_for_fits']} (files up to {AHEAD_BYTES >> 30} GiB a layer are read ahead)"]
    if streamed:
        lines += [f"peak memory: about {gb['peak_memory']} beyond Python and torch themselves"]
    else:
        held = f"{3 * total_bytes / 1e9:.1f}"
        lines += [
            f"held in memory: teacher, student and optimiser, at least {held} GB in FP32; `openling convert` holds one layer"
        ]
    rate = f"{found.disk_rate / 1e6:.0f} MB/s measured just now"
    return "\n".join([*lines, f"disk time: {found.seconds:.0f} s ({rate}); time of the fits and warm-ups is not estimated"])
