"""The nano model of load tests: loads, has every part of the layout, speaks its template, and is the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import torch

import openling
from openling.bench.nano import write_nano
from openling.weights.cluster import ENGINES, check_engine, drafts, read_checkpoint


def test_nano(tmp_path: Path) -> None:
    folder = write_nano(tmp_path / "nano")
    loaded = openling.load(folder)
    assert loaded.config.layer_kinds == ("lightning",) * 7 + ("mla",)
    checkpoint = read_checkpoint(folder)
    assert drafts(checkpoint)
    for engine in ENGINES:
        check_engine(checkpoint, engine)
    text = "Grüße, 世界 <think>"
    ids = loaded.tokenizer(text).input_ids
    assert loaded.tokenizer.decode(ids) == text
    assert len(ids) == len(text.removesuffix("<think>").encode()) + 1
    chat = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<role>USER</role>hi<|role_end|><role>ASSISTANT</role>"
    again = openling.load(write_nano(tmp_path / "again")).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in loaded.model.state_dict().items())
