"""`openling serve --engine sglang|vllm`: printed always, run where the engine is installed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

import openling
from openling.errors import UserError
from openling.serve import cluster
from openling.weights.export import save

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "ling-2.6-tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from openling.model.ling import Ling

    config = openling.load(GOLDEN).config.replace(lightning_decay_offset=0)
    return save(Ling(config), tmp_path_factory.mktemp("cluster") / "hybrid")


def test_prints_the_command_and_says_that_the_engine_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.launch("sglang", folder, tp=2, port=30000, max_model_len=8192) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"python -m sglang.launch_server --model-path {folder} --host 127.0.0.1 --port 30000 --tp-size 2 ")
    assert '"factor": 2.0' in out
    assert "--dtype" not in out
    assert "not installed here" in err


def test_an_installed_engine_is_run_with_its_own_flags(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(cluster, "installed", lambda engine: "0.5.10")
    monkeypatch.setattr(shutil, "which", lambda name: f"/programs/{name}")
    monkeypatch.setattr(os, "execv", lambda program, words: ran.append([program, *words]))
    cluster.launch("sglang", folder)
    cluster.launch("vllm", folder, dtype="bfloat16")
    cluster.launch("vllm", folder, dtype="float32", run=False)
    assert [words[0] for words in ran] == [sys.executable, "/programs/vllm"]
    assert "--mamba-scheduler-strategy" in ran[0]
    assert ran[1][-2:] == ["--dtype", "bfloat16"]
    assert ran[1][1:4] == ["/programs/vllm", "serve", str(folder)]


@pytest.mark.parametrize("wrong", [{"tp": 3}, {"port": 0}, {"max_model_len": 0}])
def test_what_does_not_fit_is_a_user_error(folder: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UserError):
        cluster.launch("vllm", folder, **wrong)


def test_a_folder_that_would_be_misread_is_a_user_error() -> None:
    with pytest.raises(UserError, match="decays with offset 0"):
        cluster.launch("vllm", GOLDEN)
