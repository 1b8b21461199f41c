"""Weighted means of checkpoints (WSM, arXiv 2507.17634): what a decay of the learning rate would have done, done afterwards.

With theta_{m+1} = theta_m - g_m, a mean of theta_n .. theta_{n+k} with weights c_0 .. c_k scales every step by the
weights of the checkpoints that saw it:

    sum_j c_j theta_{n+j} = theta_n - sum_{i=1..k} w_i g_{n+i-1}        w_i = sum_{j>=i} c_j
    for a wanted decay 1 >= w_1 >= ... >= w_k >= 0:   c_k = w_k,  c_j = w_j - w_{j+1},  c_0 = 1 - w_1

Folders are merged tensor by tensor, sums in FP64; router biases as everything else; tensors that are no floats must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openling import __version__
from openling.errors import UserError, nearest
from openling.model.families import read_config
from openling.weights.export import REMOTE_FILE, add_companions, add_launch_scripts, json_text, model_card
from openling.weights.io import CheckpointReader, FolderWriter, checked_folder, read_hf_config

# Decays of the learning rate over the merged span, from 0 (its start) to 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "mean": lambda x: 1 - x,  # equal weights are a straight fall
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
}
EXPECTED = "mean, linear, 1-sqrt, cosine, ema:ALPHA, or one number per checkpoint"


def from_decay(w: Sequence[float]) -> list[float]:
    """c_0 .. c_k of a decay w_1 .. w_k."""
    if any(b > a for a, b in zip((1.0, *w), (*w, 0.0), strict=True)):
        raise UserError("a decay falls from 1 to 0", where="weights", value=list(w), expected="1 >= w_1 >= ... >= w_k >= 0")
    return [a - b for a, b in zip((1.0, *w), (*w, 0.0), strict=True)]


def coefficients(weighting: str, count: int, *, where: str = "--weights") -> list[float]:
    """The weights of `count` checkpoints, oldest first; they come to 1.

    ema:ALPHA: a running mean m <- ALPHA theta + (1 - ALPHA) m that starts at the oldest. Numbers are scaled to come to 1.
    """
    if count < 1:
        raise UserError("there is nothing to merge", where=where, value=f"{count} checkpoints", expected="1 or more")
    if weighting in DECAYS:
        return from_decay([DECAYS[weighting](i / count) for i in range(1, count)])
    name, _, text = weighting.partition(":")
    try:
        if name == "ema" and 0 < float(text) <= 1:
            alpha = float(text)
            return [(1 - alpha) ** (count - 1), *(alpha * (1 - alpha) ** (count - 1 - j) for j in range(1, count))]
    except ValueError:
        pass
    numbers = given_numbers(weighting)
    if numbers is None:
        close = nearest(weighting, DECAYS)
        raise UserError("there is no such weighting", where=where, value=weighting, expected=EXPECTED, nearest=close)
    if len(numbers) != count:
        raise UserError(
            "there are not as many weights as checkpoints", where=where, value=f"{len(numbers)}: {weighting}",
            expected=f"{count} numbers, oldest first",
        )  # fmt: skip
    if not 0 < sum(numbers) < math.inf or any(c < 0 for c in numbers):
        what = "these numbers are no weights of a mean"
        raise UserError(what, where=where, value=weighting, expected="finite numbers, none negative, that come to more than 0")
    return [c / sum(numbers) for c in numbers]


def given_numbers(weighting: str) -> list[float] | None:
    """The weighting's numbers, as they stand; None where it is a name."""
    try:
        return [float(part) for part in weighting.split(",")]
    except ValueError:
        return None


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], name: str = "") -> Tensor:
    """sum_j c_j t_j in FP64, returned in the tensors' dtype (FP32 where they are narrower); others must be equal."""
    if abs(sum(weights) - 1) > 1e-6:
        raise UserError("the weights do not come to 1", where=name, value=sum(weights))
    first = tensors[0]
    if any(t.shape != first.shape for t in tensors):
        raise UserError("the checkpoints are of different models", where=name, value=[list(t.shape) for t in tensors])
    if not first.is_floating_point():
        if any(not torch.equal(t, first) for t in tensors):
            raise UserError("a tensor of whole numbers differs between the checkpoints", where=name, expected="equal values")
        return first
    total = torch.zeros(first.shape, dtype=torch.float64)
    for tensor, c in zip(tensors, weights, strict=True):
        total.add_(tensor.to(torch.float64), alpha=c)
    return total.to(first.dtype if first.dtype == torch.float64 else torch.float32)


def merge_folders(
    folders: Sequence[str | Path], out: str | Path, weighting: str = "mean", *, provenance: dict[str, Any] | None = None
) -> Path:
    """Merge checkpoint folders of one model, oldest first, into a new one in the dtypes of the last; returns its path."""
    sources = [checked_folder(f) for f in folders]
    weights = coefficients(weighting, len(sources))
    readers, configs = [CheckpointReader(f) for f in sources], [read_hf_config(f) for f in sources]
    last, reader, hf = sources[-1], readers[-1], configs[-1]
    for folder, other, config in zip(sources, readers, configs, strict=True):
        if hf.get("quantization_config") or config.get("quantization_config"):
            raise UserError("quantised checkpoints are not merged", where=folder, expected="BF16, FP16 or FP32 weights")
        if set(other.names()) != set(reader.names()):
            odd = sorted(set(other.names()) ^ set(reader.names()))[0]
            raise UserError("the checkpoints hold different tensors", where=folder, value=odd, expected=f"those of {last}")
        changed = sorted(k for k in {*config, *hf} if config.get(k) != hf.get(k) and k not in ("dtype", "torch_dtype"))
        if changed:
            key = changed[0]
            raise UserError(
                "the checkpoints' config.json differ", where=folder, value=f"{key} = {config.get(key)}", expected=hf.get(key)
            )
    writer = FolderWriter(out, expected_bytes=reader.total_bytes + (16 << 20))
    with writer:
        for name in reader.names():
            writer.add(name, weighted_sum([r.read(name) for r in readers], weights, name).to(reader.dtype(name)))
        writer.add_file("config.json", json_text(hf))
        if (last / REMOTE_FILE).is_file():
            writer.add_file(REMOTE_FILE, (last / REMOTE_FILE).read_bytes())
        add_companions(writer, last, read_config(hf, where=last / "config.json"))
        merged = [{"folder": f.name, "weight": c} for f, c in zip(sources, weights, strict=True)]
        record = {
            "openling_version": __version__,
            "base_model": None,
            "merged": merged,
            "weighting": weighting,
            **(provenance or {}),
        }
        writer.add_file("openling.json", json_text(record))
        add_launch_scripts(writer, hf, last, reader.names(), reader.total_bytes)
        writer.add_file("README.md", model_card(writer.out.name, hf, last, record))
    return writer.out
