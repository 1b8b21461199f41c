"""FP8 checkpoints: weights as e4m3 with scales beside them, read as FP32 and written back in the same form.

Two forms: block, `X.weight_scale_inv` [ceil(N / b), ceil(K / b)] with b = 128 unless config.json says otherwise; and per channel,
`X.weight_scale` [N, 1] or [N]. In both, weight = stored * scale, in FP32: a bare cast of the stored values gives a random model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openling.errors import UserError
from openling.weights.headers import DTYPES, Span
from openling.weights.io import TensorFiles

SUFFIXES = {"_scale_inv": "block", "_scale": "channel"}
LARGEST = 448.0  # of e4m3
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Form:
    """How a matrix is quantised: the scale's suffix, its dtype, whether it has a second dimension, and the block."""

    kind: Literal["block", "channel"]
    suffix: str
    scale_dtype: torch.dtype
    flat: bool
    block: tuple[int, int]

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a matrix [N, K]."""
        if self.kind == "channel":
            return (shape[0],) if self.flat else (shape[0], 1)
        return tuple(math.ceil(n / b) for n, b in zip(shape, self.block, strict=True))

    def widen(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Scales as FP32 that broadcast over a matrix of this shape."""
        if self.kind == "channel":
            return scale.float().reshape(-1, 1)
        (rows, columns), (high, wide) = shape, self.block
        return scale.float().repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]

    def quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """e4m3 values and scales of a matrix: each block's or row's largest value becomes the largest of e4m3."""
        weight = weight.float()
        rows, columns = weight.shape
        high, wide = (1, columns) if self.kind == "channel" else self.block
        padded = torch.nn.functional.pad(weight.abs(), (0, -columns % wide, 0, -rows % high))
        largest = padded.unflatten(1, (-1, wide)).amax(2).unflatten(0, (-1, high)).amax(1)
        scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
        if self.scale_dtype == torch.float8_e8m0fnu:
            scale = _power_above(scale)
        else:
            about = torch.finfo(self.scale_dtype)
            scale = scale.clamp(min=about.tiny * about.eps)  # what is smaller would be stored as zero
        scale = scale.reshape(self.scale_shape((rows, columns))).to(self.scale_dtype)
        scaled = (weight / self.widen(scale, (rows, columns))).clamp(-LARGEST, LARGEST)
        return scaled.to(torch.float8_e4m3fn), scale


def _power_above(scale: Tensor) -> Tensor:
    """The smallest powers of two that are no smaller, as far as E8M0 goes: its cast takes the nearest, which cuts values off."""
    mantissa, exponent = torch.frexp(scale)  # mantissa from 1/2 to below 1
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(scale), exponent)


class Dequantised(TensorFiles):
    """The tensors of a folder with its FP8 matrices as FP32; their scales are not listed.

    `forms` says how each FP8 matrix is stored, `scales` names the scales, `raw` has the tensors as they are. Raises UserError for
    an FP8 tensor without a scale, a scale of the wrong shape, a scale without its FP8 tensor.
    """

    def __init__(self, raw: TensorFiles, hf_config: dict[str, Any]) -> None:
        super().__init__(raw.folder, raw.spans)
        self.raw = raw
        block = block_size(hf_config, raw.folder)
        self.forms = {name: self._form(name, block) for name in raw.names() if raw.dtype(name) in FP8}
        self.scales = {name + form.suffix for name, form in self.forms.items()}
        for name in raw.names():
            if name.endswith(tuple(SUFFIXES)) and name not in self.scales:
                weight = name.removesuffix("_inv").removesuffix("_scale")
                found = str(raw.dtype(weight)) if weight in raw else "no such tensor"
                raise UserError(
                    "a scale without its FP8 tensor", where=f"{name} in {raw.folder}", value=found, expected=f"{weight} in FP8"
                )

    def _form(self, name: str, block: tuple[int, int]) -> Form:
        raw, shape = self.raw, self.raw.shape(name)
        suffix = next((s for s in SUFFIXES if name + s in raw), None)
        if suffix is None or len(shape) != 2:
            raise UserError(
                "an FP8 tensor has no scale" if suffix is None else "an FP8 tensor is not a matrix",
                where=f"{name} in {raw.folder}",
                value=list(shape),
                expected=f"{name}_scale_inv, one per {block[0]} x {block[1]} block, or {name}_scale, one per row",
                next="copy or download the folder again",
            )
        scale = name + suffix
        if not raw.dtype(scale).is_floating_point:
            raise UserError(
                "an FP8 scale is no floating-point number",
                where=f"{scale} in {raw.folder}",
                value=raw.spans[scale].dtype,
                expected="F32, BF16, F16 or F8_E8M0",
                next="copy or download the folder again",
            )
        kind: Literal["block", "channel"] = "block" if suffix == "_scale_inv" else "channel"
        form = Form(kind, suffix, raw.dtype(scale), len(raw.shape(scale)) == 1, block)
        if raw.shape(scale) != form.scale_shape(shape):
            raise UserError(
                "an FP8 scale has the wrong shape",
                where=f"{scale} in {raw.folder}",
                value=list(raw.shape(scale)),
                expected=f"{list(form.scale_shape(shape))} for {list(shape)}, blocks of {block[0]} x {block[1]}",
                next="set weight_block_size in config.json's quantization_config, or copy the folder again",
            )
        return form

    def names(self) -> list[str]:
        """All tensor names but those of scales."""
        return [name for name in self.raw.names() if name not in self.scales]

    def __contains__(self, name: object) -> bool:
        return name in self.raw and name not in self.scales

    def dtype(self, name: str) -> torch.dtype:
        """FP32 for FP8 matrices."""
        return torch.float32 if name in self.forms else self.raw.dtype(name)

    def read_rows(self, name: str, first: int, count: int | None) -> Tensor:
        """As `TensorFiles.read_rows`, dequantised in FP32."""
        form = self.forms.get(name)
        if form is None:
            return self.raw.read_rows(name, first, count)
        if count is not None:
            return self.read_rows(name, 0, None)[first : first + count].clone()
        stored, scale = self.raw.read(name).float(), self.raw.read(name + form.suffix).float()
        widened = form.widen(scale, tuple(stored.shape))
        # A zero scale is right where all that it scales is zero, too.
        if (scale < 0).any() or ((scale == 0).any() and ((widened == 0) & (stored != 0)).any()):
            raise UserError(
                "an FP8 scale is not above zero",
                where=f"{name + form.suffix} in {self.raw.folder}",
                value=float(scale.min()),
                expected="positive scales: quantising gives no others",
                next="copy or download the folder again",
            )
        return stored * widened


def block_size(hf_config: dict[str, Any], folder: Path) -> tuple[int, int]:
    """Rows and columns of a block by config.json, 128 unless it says otherwise; UserError for settings of another kind."""

    def wrong(key: str, value: object, expected: str) -> UserError:
        return UserError("this setting of config.json is not valid", where=f"{key} in {folder}", value=value, expected=expected)

    settings = hf_config.get("quantization_config")
    if not isinstance(settings, dict | None):
        raise wrong("quantization_config", settings, 'an object, like {"quant_method": "fp8", "weight_block_size": [128, 128]}')
    size, listed = (settings or {}).get("weight_block_size"), (settings or {}).get("modules_to_not_convert")
    if not (listed is None or (isinstance(listed, list) and all(isinstance(entry, str) for entry in listed))):
        raise wrong("quantization_config.modules_to_not_convert", listed, "a list of names of modules")
    if size is None:
        return 128, 128
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise wrong("quantization_config.weight_block_size", size, "two positive integers, like [128, 128]")
    return size[0], size[1]


def opened_values(raw: TensorFiles, hf_config: dict[str, Any]) -> TensorFiles:
    """The tensors of a folder as values: itself, or dequantised where it holds FP8 matrices or scales."""
    block_size(hf_config, raw.folder)
    quantised = any(raw.spans[name].dtype.startswith("F8_E4") or name.endswith(tuple(SUFFIXES)) for name in raw.names())
    return Dequantised(raw, hf_config) if quantised else raw


def quantization_config(settings: dict[str, Any], stored: dict[str, Span], source: TensorFiles) -> dict[str, Any]:
    """What config.json of a folder made of `source` says of FP8: `settings`, with the linear modules that are none of it.

    stored: the new folder's tensors (of joined ones the first). Entries of `modules_to_not_convert` that still name something
    stay. Without such a list the source names nothing, and neither does the folder while it adds no such module.
    """
    fp8 = {name for name, span in stored.items() if DTYPES[span.dtype] in FP8}
    plain = _modules(stored) - _modules(fp8)
    matrices = [name for name, span in stored.items() if name.endswith(".weight") and len(span.shape) == 2 and name not in fp8]
    linear = [name for name in matrices if not name.endswith("word_embeddings.weight")]
    listed = settings.get("modules_to_not_convert")
    if listed is None and all(n == "lm_head.weight" or (n in source and source.dtype(n) not in FP8) for n in linear):
        return settings
    kept = [entry for entry in listed or () if entry in plain]
    # Experts without any FP8 are one entry instead of hundreds, and one module to transformers.
    experts = {name: name.partition(".experts.")[0] + ".experts" for name in linear}
    modules = [experts[name] if experts[name] in plain else name.removesuffix(".weight") for name in linear]
    return settings | {"modules_to_not_convert": list(dict.fromkeys([*kept, *modules]))}


def _modules(names: Iterable[str]) -> set[str]:
    """Every module that one of these tensors lies in."""
    return {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
