"""A migration whose warm-ups are recipes, as on many ranks: convert, follow the teacher, convert, follow the teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import Place, openling_command
from test_gates import learn
from transformers import AutoModelForCausalLM

from openling.weights.folder import load

RECIPE = """
name = "warm"
[model]
folder = "{student}"
teacher = "{teacher}"
[corpora.texts]
build = ["{text}"]
[[sources]]
corpus = "texts"
repeat = 1000
[train]
kl = 1
ce = 0
batch_size = 4
lr = 2e-3
weight_decay = 0
trainable = ['\\.attention\\.']
[[stages]]
name = "{stage}"
steps = 12
mixture = {{ length = 64 }}
"""


def warm_up(folder: Path, place: Place, student: Path, stage: str) -> Path:
    path, run = folder / f"{stage}.toml", folder / stage
    path.write_text(RECIPE.format(student=student, teacher=place.teacher, text=place.calibration, stage=stage))
    result = openling_command("train", path, "--out", run)
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] < 0.9 * lines[0]["kl"]
    return run / "models" / stage


@pytest.mark.usefixtures("quick")
def test_warm_ups_by_recipe_between_conversions(tmp_path: Path) -> None:
    place = learn(tmp_path)
    half, whole = tmp_path / "half", tmp_path / "whole"
    assert place.migrate(half, "--stage", "lightning").code == 0
    warm = warm_up(tmp_path, place, half, "linear")
    result = place.migrate(whole, "--stage", "mla", "--teacher", place.teacher, model=warm)
    assert result.code == 0, result.err
    out = warm_up(tmp_path, place, whole, "mla")
    told = json.loads((out / "openling.json").read_text())
    assert told["teacher"] == str(place.teacher)
    ours, before, theirs = (load(folder) for folder in (out, whole, place.teacher))
    assert set(ours.config.layer_kinds) == {"lightning", "mla"}
    # What is not attention is the teacher's, bit for bit.
    state = ours.model.state_dict()
    rest = {name: tensor for name, tensor in theirs.model.state_dict().items() if ".attention." not in name}
    assert rest and all(torch.equal(state[name], tensor) for name, tensor in rest.items())
    assert any(not torch.equal(state[name], t) for name, t in before.model.state_dict().items())
    shutil.rmtree(tmp_path / "linear")  # the result stands by itself
    ids = torch.arange(40)[None] % 250
    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, load(out, dtype=torch.float32).model(ids), atol=1e-5, rtol=1e-5)
