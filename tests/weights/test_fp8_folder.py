"""What can be wrong with the FP8 of a folder: settings and scales that no quantiser writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openling.errors import UserError
from openling.weights.fp8 import Dequantised, Form, block_size, opened_values
from openling.weights.io import CheckpointReader, FolderWriter

BLOCK = Form("block", "_scale_inv", torch.float32, False, (8, 16))
CHANNEL = Form("channel", "_scale", torch.float32, False, (8, 16))
SETTINGS = {"weight_block_size": [8, 16]}


def folder(path: Path, form: Form, weight: Tensor, scale: Tensor | None = None) -> CheckpointReader:
    values, own = form.quantise(weight)
    with FolderWriter(path) as writer:
        writer.add("w", values)
        writer.add("w" + form.suffix, own if scale is None else scale)
    return CheckpointReader(path)


@pytest.mark.parametrize(
    "changes",
    [
        *({"weight_block_size": json.loads(size)} for size in ("16", '"16"', "[0,0]", '["a","b"]', "[NaN,1]", "[16.0,16.0]")),
        *({"weight_block_size": size} for size in ([16], [16, 16, 16], [-8, 16], [True, 16], [], 0, "", False, {}, [None, 16])),
        {"modules_to_not_convert": 5},
        {"modules_to_not_convert": [5]},
        {"modules_to_not_convert": "lm_head"},
    ],
    ids=str,
)
def test_settings_of_another_kind(changes: dict[str, Any], tmp_path: Path) -> None:
    raw = folder(tmp_path / "m", BLOCK, torch.randn(16, 32))
    with pytest.raises(UserError, match="not valid") as error:
        opened_values(raw, {"quantization_config": changes})
    assert f"quantization_config.{next(iter(changes))} in {tmp_path}" in str(error.value)


@pytest.mark.parametrize("value", ["fp8", 5, True, False, 0, "", [], [1]])
def test_quantization_config_of_another_kind(value: object) -> None:
    with pytest.raises(UserError, match="not valid") as error:
        block_size({"quantization_config": value}, Path("m"))
    assert "quantization_config in m" in str(error.value)
    assert block_size({"quantization_config": None}, Path("m")) == block_size({}, Path("m")) == (128, 128)
    assert block_size({"quantization_config": SETTINGS}, Path("m")) == (8, 16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
@pytest.mark.parametrize("form", [BLOCK, CHANNEL], ids=lambda form: form.kind)
def test_scales_of_integers(form: Form, dtype: torch.dtype, tmp_path: Path) -> None:
    raw = folder(tmp_path / "m", form, torch.randn(16, 32), torch.ones(form.scale_shape((16, 32)), dtype=dtype))
    with pytest.raises(UserError, match="no floating-point number") as error:
        Dequantised(raw, {"quantization_config": SETTINGS})
    assert f"w{form.suffix} in {tmp_path}" in str(error.value)


@pytest.mark.parametrize("form", [BLOCK, CHANNEL], ids=lambda form: form.kind)
def test_scales_that_are_not_positive(form: Form, tmp_path: Path) -> None:
    """But for a zero scale of zeros, which changes nothing."""
    weight = torch.randn(16, 32)
    weight[:8] = 0
    scale = form.quantise(weight)[1]
    assert (scale > 0).all()
    for row, value in ((0, -1.0), (-1, -1e-3), (-1, 0.0)):
        bad = scale.clone()
        bad[row] = value
        values = Dequantised(folder(tmp_path / f"{row} {value}", form, weight, bad), {"quantization_config": SETTINGS})
        with pytest.raises(UserError, match="not above zero") as error:
            values.read("w")
        assert f"w{form.suffix} in" in str(error.value)
    scale[0] = 0
    found = Dequantised(folder(tmp_path / "dead", form, weight, scale), {"quantization_config": SETTINGS}).read("w")
    assert not found[:8].any() and (found[8:] - weight[8:]).abs().max() < 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-7, 1.0])
def test_our_quantiser_writes_no_zero_scale(dtype: torch.dtype, size: float) -> None:
    form = Form("block", "_scale_inv", dtype, False, (8, 16))
    values, scale = form.quantise(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) * size)
    assert (scale.float() > 0).all()
    assert values.float().isfinite().all()
