"""Safetensors headers: where every tensor of a file lies, without touching a weight; and the header of a new file.

A file is 8 bytes of length, that many bytes of JSON `{name: {"dtype", "shape", "data_offsets": [start, end]}}`, then the
tensors without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The format's own limit.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Span:
    """A tensor inside a file: `start` and `end` are bytes from the beginning of the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.end - self.start


def read_header(path: Path) -> dict[str, Span]:
    """Every tensor of a file, in the order of its bytes. ValueError says what is wrong with a damaged file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError("the header is longer than the file")
        try:
            entries = json.loads(file.read(length))
        except RecursionError as error:
            raise ValueError("the header is nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("the header is not a JSON object")
    entries.pop("__metadata__", None)
    base = 8 + length
    spans = {name: _span(path.name, name, entry, base) for name, entry in entries.items()}
    spans = dict(sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)))
    end = base
    for name, span in spans.items():
        if span.start != end:
            raise ValueError(f"{name} begins at byte {span.start}, not at {end}")
        end = span.end
    if end != size:
        raise ValueError(f"the tensors end at byte {end}")
    return spans


def _span(shard: str, name: str, entry: Any, base: int) -> Span:
    found = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (found.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"the entry of {name} is not its type, its sizes and where it begins and ends: {str(entry)[:80]}")
    span = Span(shard, dtype, tuple(shape), base + offsets[0], base + offsets[1])
    known = DTYPES.get(span.dtype)
    if known is not None and math.prod(span.shape) * known.itemsize != span.nbytes:
        raise ValueError(f"{name} has {span.nbytes} bytes, which do not fit its shape {list(span.shape)}")
    return span


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def write_header(entries: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The header of a file that holds (name, dtype, shape, bytes) in this order, padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, nbytes in entries:
        start, end = end, end + nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
