"""Tiny teachers in several shards, and conversions of them from folder to folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from test_convert import BASE, FAMILIES, build, teacher_config, windows

from openling.config.migrate import MigrateConfig, preset
from openling.migrate.stream import Job
from openling.weights.export import save
from openling.weights.fp8 import Form
from openling.weights.io import CheckpointReader, FolderWriter

LAYOUT = {"group_size": 2, "kv_lora_rank": 16, "q_lora_rank": 24}
LING = "BailingMoeV2ForCausalLM"


def settings(name: str = "best", stages=("lightning", "mla"), **changes) -> MigrateConfig:
    short = {"sequence_length": 32, "calibration_tokens": 96}
    return preset(name, stages=stages, layout=LAYOUT, text=short, **changes)


def teacher(folder: Path, family: str = LING, dtype=torch.bfloat16) -> Path:
    """A folder in the family's own names."""
    hf = {"architectures": [family], **BASE, **FAMILIES[family]}
    return save(build(teacher_config(family)), folder, dtype=dtype, hf_config=hf, shard_bytes=20_000)


def quantised(source: Path, folder: Path, form: Form, *besides: str, **settings: object) -> Path:
    """A copy whose matrices are FP8 (but for embeddings, head and router, as released, and `besides`); config.json says so."""
    reader = CheckpointReader(source)
    with FolderWriter(folder, shard_bytes=20_000) as writer:
        for name in reader.names():
            tensor, plain = reader.read(name), ("embeddings", "lm_head", "mlp.gate.", "eh_proj", *besides)
            if tensor.dim() != 2 or any(word in name for word in plain):
                writer.add(name, tensor)
                continue
            values, scale = form.quantise(tensor)
            writer.add(name, values)
            writer.add(name + form.suffix, scale)
        config = json.loads((source / "config.json").read_text())
        about = {"quant_method": "fp8", "weight_block_size": list(form.block), **settings}
        writer.add_file("config.json", json.dumps(config | {"quantization_config": about}))
    return folder


def job(source: Path, out: Path, *, mode="copy", text=True, config: MigrateConfig | None = None) -> Job:
    return Job(source, out, config or settings(), mode, windows() if text else None)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.names()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def hashes(folder: Path) -> dict[str, str]:
    """Of every file but the manifest, which tells when the source was last changed."""
    files = (p for p in folder.iterdir() if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
