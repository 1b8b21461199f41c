"""The official Ling code's own outputs, through `openling.load`: prefill, in chunks, token by token, MTP."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import GOLDEN

import openling

# The official code's cached decoding differs from its own prefill by 1.4e-5 (golden/README.md); 1e-4 is the project's bound.
TOLERANCE = {"atol": 1e-4, "rtol": 0}
CASES = ("ling-2.6-tiny", "ling-2.0-tiny")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", [(96,), (1, 6, 64, 25), (1,) * 96], ids=["prefill", "chunks", "tokens"])
@torch.no_grad()
def test_logits_and_hidden_states(case: str, pieces: tuple[int, ...]) -> None:
    loaded = openling.load(GOLDEN / case)
    assert loaded.tokenizer is None
    assert not loaded.model.training
    expected = load_file(GOLDEN / case / "expected.safetensors")
    cache = loaded.model.new_cache() if len(pieces) > 1 else None
    logits, states = [], []
    for ids in expected["input_ids"].split(pieces, dim=1):
        hidden: list[torch.Tensor] = []
        logits.append(loaded.model(ids, cache=cache, hidden_states=hidden))
        states.append(hidden)
    torch.testing.assert_close(torch.cat(logits, 1), expected["logits"], **TOLERANCE)
    for i, parts in enumerate(zip(*states, strict=True)):
        torch.testing.assert_close(torch.cat(parts, 1), expected[f"hidden_states.{i}"], **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_mtp_logits(case: str) -> None:
    model = openling.load(GOLDEN / case).model
    expected = load_file(GOLDEN / case / "expected.safetensors")
    (logits,) = model.mtp_logits(expected["input_ids"], model.model(expected["input_ids"]))
    torch.testing.assert_close(logits, expected["mtp_logits"], **TOLERANCE)
