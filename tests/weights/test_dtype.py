"""`--dtype`: the stored dtype, unless a CPU multiplies another faster and that fits, or the user names one; said once."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from openling.bench.nano import write_nano
from openling.cli import main
from openling.ops import cpu
from openling.weights.dtype import load_computed, pick_dtype
from openling.weights.folder import open_folder

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nano(tmp_path_factory.mktemp("dtype") / "nano")


def stored_in(dtype: torch.dtype, nano: Path, folder: Path) -> Path:
    shutil.copytree(nano, folder)
    for file in folder.glob("*.safetensors"):
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("pays", [True, False])
def test_auto_follows_the_self_test_on_a_cpu_only(
    pays: bool, nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "bf16_matmuls_pay", lambda: pays)
    bf16 = open_folder(stored_in(torch.bfloat16, nano, tmp_path / "bf16"))
    fp16 = open_folder(stored_in(torch.float16, nano, tmp_path / "fp16"))
    fp32 = open_folder(nano)
    here = pick_dtype("auto", bf16, CPU)
    assert here.dtype == (torch.bfloat16 if pays else torch.float32)
    assert str(here) == (
        "bfloat16" if pays else "bfloat16 in the folder, computed in float32 (faster on this CPU; --dtype bfloat16 keeps it)"
    )
    assert str(pick_dtype("auto", fp16, CPU)) == "float16 in the folder, computed in float32 (faster on this CPU)"
    assert str(pick_dtype("auto", fp32, CPU)) == "float32"
    assert [pick_dtype("auto", opened, GPU).dtype for opened in (bf16, fp16, fp32)] == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]


def test_a_wider_copy_must_fit(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "bf16_matmuls_pay", lambda: False)
    opened = open_folder(stored_in(torch.bfloat16, nano, tmp_path / "bf16"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    chosen = pick_dtype("auto", opened, CPU)
    assert chosen.dtype == torch.bfloat16
    assert "do not fit" in str(chosen)
    assert pick_dtype("float32", opened, CPU).dtype == torch.float32  # whoever names one gets it


def test_a_named_dtype_is_loaded(nano: Path) -> None:
    loaded, chosen = load_computed(nano, dtype="bfloat16", device=CPU)
    assert loaded.model.lm_head.weight.dtype == chosen.dtype == torch.bfloat16
    assert str(chosen) == "float32 in the folder, computed in bfloat16 (--dtype bfloat16)"


def test_generate_takes_the_flag_and_says_so_once(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(nano), "hi", "--max-new-tokens", "2", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().err.count("computed in bfloat16 (--dtype bfloat16)") == 1
