"""Conversion from folder to folder: the in-memory result to the bit, whatever is untouched byte for byte, and resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_convert import build, teacher_config, windows

import openling
from openling.config.migrate import preset
from openling.migrate.convert import to_lightning, to_mla
from openling.migrate.layout import lightning_stage, mla_stage
from openling.migrate.pipeline import _round
from openling.migrate.stream import Job, convert_folder
from openling.weights.export import save
from openling.weights.io import INDEX, CheckpointReader

LAYOUT = {"group_size": 2, "kv_lora_rank": 16, "q_lora_rank": 24}
FAMILIES = ("LlamaForCausalLM", "MixtralForCausalLM", "BailingMoeV2ForCausalLM")


def settings(name="best", stages=("lightning", "mla"), **changes):
    return preset(name, stages=stages, layout=LAYOUT, **changes)


def teacher(folder: Path, family: str = "BailingMoeV2ForCausalLM", dtype=torch.bfloat16, **changes) -> Path:
    """A folder of several shards in the family's own names."""
    c = teacher_config(family).replace(**changes)
    hf = {"architectures": [family], **_hf(family)}
    return save(build(c), folder, dtype=dtype, hf_config=hf, shard_bytes=20_000)


def _hf(family):
    from test_convert import BASE
    from test_convert import FAMILIES as ALL

    return {**BASE, **ALL[family]}


def job(source, out, *, mode="copy", text=True, config=None):
    return Job(source, out, config or settings(), mode, windows() if text else None)


def tensors(folder):
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.names()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def in_memory(source, out, config):
    """What the pipeline does: FP32 models, rounded between the stages."""
    loaded = openling.load(source)
    stored = loaded.model.lm_head.weight.dtype
    model, layout, quiet = loaded.model.float(), config.layout.model_dump(), {"on_layer": lambda i: None, "bf16": True}
    if "lightning" in config.stages:
        half = lightning_stage(loaded.config, layout)
        model, _ = to_lightning(model, half, windows(), config.conversion, seed=config.seed, **quiet)
        _round(model, stored)
    if "mla" in config.stages:
        model, _ = to_mla(model, mla_stage(model.config, layout), windows(), config.conversion, **quiet)
        _round(model, stored)
    return save(model, out, dtype=stored, source=source)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["copy", "link"])
def test_the_result_is_the_in_memory_one_to_the_bit(family, mode, tmp_path):
    source = teacher(tmp_path / "source", family)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    convert_folder(job(source, tmp_path / "out", mode=mode), resume=False)
    in_memory(source, tmp_path / "memory", settings())
    same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    config = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "memory")]
    assert config[0] == config[1]
    ids = windows()[0][:1]
    with torch.inference_mode():
        models = [openling.load(tmp_path / name, dtype=torch.float32).model for name in ("out", "memory")]
        assert torch.equal(models[0](ids), models[1](ids))
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_one_stage_at_a_time_is_both_at_once(tmp_path):
    source = teacher(tmp_path / "source", dtype=torch.float32)
    convert_folder(job(source, tmp_path / "half", mode="link", config=settings(stages=("lightning",))), resume=False)
    convert_folder(job(tmp_path / "half", tmp_path / "hybrid", mode="link", config=settings(stages=("mla",))), resume=False)
    convert_folder(job(source, tmp_path / "both"), resume=False)
    same(tensors(tmp_path / "hybrid"), tensors(tmp_path / "both"))


def test_links_share_bytes_and_name_what_is_stale(tmp_path):
    source = teacher(tmp_path / "source")
    report = convert_folder(job(source, tmp_path / "out", mode="link"), resume=False)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    linked = [p for p in (tmp_path / "out").glob("*.safetensors") if p.stat().st_nlink == 2]
    assert linked and report["bytes linked"] == sum(p.stat().st_size for p in linked)
    for path in linked:
        assert path.samefile(source / path.name)
    stale = set(index["metadata"]["stale_in"])
    assert stale and stale <= {p.name for p in linked}
    # A shard is linked unless most of it was attention; those are few and small here.
    assert report["bytes copied"] < report["bytes linked"]


def test_weights_alone_need_neither_text_nor_the_experts(tmp_path, monkeypatch):
    source = teacher(tmp_path / "source")
    read = []
    original = CheckpointReader.read_rows
    monkeypatch.setattr(CheckpointReader, "read_rows", lambda s, n, a, b: read.append(n) or original(s, n, a, b))
    for name in ("out", "again"):
        convert_folder(job(source, tmp_path / name, mode="link", text=False), resume=False)
    assert read and all("attention" in n or "input_layernorm" in n for n in read)
    same(tensors(tmp_path / "out"), tensors(tmp_path / "again"))
    logits = openling.load(tmp_path / "out", dtype=torch.float32).model(windows()[0][:1])
    assert logits.isfinite().all()
