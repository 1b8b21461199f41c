"""`openling merge` over a stage of a run: the model is the stage's own, whatever folder its other tensors come from."""

import json

import pytest
import torch
from test_stages import go

from openling.cli import main
from openling.weights.folder import load

FROZEN = [("stages.long.trainable", '["attention"]'), ("stages.long.merge", "null")]


def merge(stage, out, *words):
    """Merge in FP32; the exit code."""
    return main(["merge", str(stage), str(out), "--dtype", "float32", *map(str, words)])


def assert_same_model(one, two):
    one, two = load(one), load(two)
    assert one.config == two.config
    for name, tensor in two.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], tensor), name


def test_the_stage_s_positions_hold_over_those_of_the_base(tmp_path, capsys):
    """The second stage has another RoPE, and trains parts alone."""
    run, best = tmp_path / "run", tmp_path / "best"
    go(tmp_path, run, changes=FROZEN)
    stage, base = run / "stages" / "long", run / "models" / "short"
    assert load(base).config.rope_theta != load(run / "models" / "long").config.rope_theta
    assert merge(stage, tmp_path / "no") == 2 and "did not train every tensor" in capsys.readouterr().err
    assert merge(stage, tmp_path / "out", "--base", base, "--steps", "6") == 0
    assert_same_model(tmp_path / "out", run / "models" / "long")
    # --best measures what it writes.
    text = tmp_path / "story.txt"
    assert merge(stage, best, "--base", base, "--best", "1", "--steps", "6", "--eval-text", text) == 0
    told = json.loads((best / "openling.json").read_text())["held_out"]
    whole = load(run / "models" / "long")
    windows = torch.tensor(whole.tokenizer(text.read_text()).input_ids[: told["tokens"]]).view(-1, 64)
    with torch.inference_mode():
        logits = whole.model(windows)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert told["losses"]["6"] == pytest.approx(float(expected), rel=1e-5)


def test_a_base_of_another_shape_names_the_key(tmp_path, capsys):
    for name, width in (("run", "32"), ("other", "48")):
        go(tmp_path, tmp_path / name, changes=[*FROZEN, ("model.overrides.hidden_size", width)])
    other = tmp_path / "other" / "models" / "short"
    assert merge(tmp_path / "run" / "stages" / "long", tmp_path / "no", "--base", other) == 2
    told = capsys.readouterr().err
    assert f"where:    --base {other}, hidden_size\n  value:    48\n  expected: 32" in told and not (tmp_path / "no").exists()


def test_a_head_that_is_the_embedding_is_merged_as_it_trained(tmp_path):
    run = tmp_path / "run"
    go(tmp_path, run, changes=[("model.overrides.tie_word_embeddings", "1"), ("stages.long.merge", "null")])
    for words in ([], ["--base", run / "models" / "short"]):
        out = tmp_path / f"out{len(words)}"
        assert merge(run / "stages" / "long", out, "--steps", "6", *words) == 0
        assert_same_model(out, run / "models" / "long")


@pytest.mark.parametrize(("steps", "nearest"), [("6,4", "4,6"), ("4,4", "4"), ("6,2,4,2", "2,4,6")])
def test_steps_that_do_not_rise_are_refused(tmp_path, capsys, steps, nearest):
    """Sorted in silence, they would be given one another's weights."""
    stage = tmp_path / "stages" / "any"
    (stage / "checkpoints").mkdir(parents=True)
    assert merge(stage, tmp_path / "no", "--steps", steps, "--weights", "0.9,0.1") == 2
    told = capsys.readouterr().err
    assert "steps rise" in told and f"nearest:  {nearest}\n" in told
