"""Layers of which a projection is all zero: the conversion is right, or one message names the layer."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import Place, make_llama, openling_command, weights_only

import openling
from openling.migrate import convert
from openling.migrate.calibrate import Gram
from openling.migrate.verify import verify

DEAD = 1  # of four layers; by default the last becomes MLA


@pytest.fixture
def place(tmp_path) -> Place:
    texts = [tmp_path / "calibration.txt", tmp_path / "evaluation.txt"]
    for text, power in zip(texts, (2, 3), strict=True):
        text.write_text(" ".join(str(number**power) for number in range(4000)))
    return Place(tmp_path / "teacher", *texts)


def kill(place: Place, projection: str) -> None:
    path = make_llama(place.teacher) / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.layers.{DEAD}.self_attn.{projection}.weight"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})


def run(place: Place, layout: str, *words: str):
    out = place.teacher.parent / "out"
    how = words or ("--text", place.calibration)
    return out, openling_command("convert", place.teacher, out, "--layout", layout, *how)


def numbers(found) -> list[float]:
    if isinstance(found, dict | list):
        return [n for part in (found.values() if isinstance(found, dict) else found) for n in numbers(part)]
    return [found] if isinstance(found, int | float) else []


@pytest.mark.parametrize("layout", ["ling", str(DEAD)])
@pytest.mark.parametrize("projection", ["v_proj", "o_proj"])
def test_a_layer_that_said_nothing_says_nothing(place, projection, layout):
    kill(place, projection)
    out, result = run(place, layout)
    assert result.code == 0, result.err
    report = json.loads((out.parent / "out.run" / "report.json").read_text())
    assert all(map(math.isfinite, numbers(report)))
    assert not [check for check in verify(place.teacher, out) if check.outcome == "wrong"]
    before, after = (openling.load(folder, dtype=torch.float32).model for folder in (place.teacher, out))
    said: list[torch.Tensor] = []
    for model in (before, after):
        model.model.layers[DEAD].attention.register_forward_hook(lambda module, args, output: said.append(output))
    with torch.inference_mode():
        ids = torch.arange(32)[None]
        assert before(ids).isfinite().all() and after(ids).isfinite().all()
    assert not said[0].any() and not said[1].any()


def test_a_layer_that_says_nothing_loses_nothing_when_layers_are_selected(place):
    kill(place, "o_proj")
    words = ("--text", place.calibration, "--conversion.layer_score", "local")
    out, result = run(place, "selected", *words)
    assert result.code == 0, result.err
    config = openling.load(out).config
    assert config.layer_kinds.count("mla") == 1 and config.layer_kinds[DEAD] == "lightning"


def test_a_layer_that_says_nothing_is_no_error_of_a_migration(place):
    kill(place, "o_proj")
    result = place.migrate(place.teacher.parent / "migrated")
    assert result.code == 0, result.err
    report = json.loads((place.teacher.parent / "migrated.run" / "report.json").read_text())
    assert all(map(math.isfinite, numbers(report)))
    assert report["stages"][-1]["layers"][DEAD]["local"] == 0


@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
def test_without_queries_or_keys_a_layer_becomes_mla(place, projection):
    """Where it reads the mean of the values, as it did."""
    kill(place, projection)
    out, result = run(place, str(DEAD))
    assert result.code == 0, result.err
    report = json.loads((out.parent / "out.run" / "report.json").read_text())
    assert all(map(math.isfinite, numbers(report)))
    errors = [a["value"] for a in report["approximations"] if a["layer"] == DEAD and "after the refit" in a["measure"]]
    assert errors and max(errors) < 0.05
    assert not [check for check in verify(place.teacher, out) if check.outcome == "wrong"]


@pytest.mark.parametrize("words", [(), ("--weights-only",)])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
def test_without_queries_or_keys_no_layer_becomes_lightning(place, projection, words):
    kill(place, projection)
    out, result = run(place, "ling", *words)
    assert result.code == 1 and "Traceback" not in result.err
    for part in ("cannot become Lightning", f"layer {DEAD}", f"{projection} is all zero", f"--layout {DEAD}"):
        assert part in result.err
    assert not out.exists()


def test_a_migration_names_the_layer_too(place, tmp_path):
    kill(place, "q_proj")
    with weights_only():
        result = place.migrate(tmp_path / "out", "--stages", "lightning")
    assert result.code == 1 and f"layer {DEAD}" in result.err and "q_proj is all zero" in result.err


def test_algebra_without_a_solution_names_its_layer(place, monkeypatch):
    def singular(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("singular")

    make_llama(place.teacher)
    monkeypatch.setattr(convert, "refit_output", singular)
    _, result = run(place, "ling")
    assert result.code == 1 and "layer 0" in result.err and "singular" in result.err


def test_a_regression_on_zeros_is_its_prior():
    gram = Gram()
    gram.add(torch.zeros(5, 3), torch.randn(5, 2))
    prior = torch.randn(2, 3)
    assert torch.equal(gram.ridge(1e-3, prior), prior.double())
    assert torch.equal(gram.ridge(1e-3), torch.zeros(2, 3, dtype=torch.float64))
