"""Weightings against closed forms and the published vectors; merged folders against sums by hand."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openling.bench.nano import NANO
from openling.cli import main
from openling.errors import UserError
from openling.model.ling import Ling
from openling.weights.export import save
from openling.weights.folder import load
from openling.weights.merge import coefficients, from_decay, merge_folders, weighted_sum


def test_published_vectors():
    # Table of the WSM specification for five checkpoints, to its six digits.
    assert coefficients("mean", 5) == pytest.approx([0.2] * 5, abs=1e-15)
    assert coefficients("linear", 5) == coefficients("mean", 5)
    expected = [0.447214, 0.185242, 0.142141, 0.119831, 0.105573]
    assert coefficients("1-sqrt", 5) == pytest.approx(expected, abs=5e-7)
    assert from_decay([0.8, 0.6, 0.4, 0.2]) == pytest.approx([0.2] * 5, abs=1e-15)


@given(count=st.integers(1, 40))
def test_closed_forms(count):
    assert coefficients("mean", count) == pytest.approx([1 / count] * count, abs=1e-14)
    root = [math.sqrt((j + 1) / count) - math.sqrt(j / count) for j in range(count)]
    assert coefficients("1-sqrt", count) == pytest.approx(root, abs=1e-14)
    wave = [0.5 * (math.cos(math.pi * j / count) - math.cos(math.pi * (j + 1) / count)) for j in range(count)]
    assert coefficients("cosine", count) == pytest.approx(wave, abs=1e-14)
    assert sum(coefficients("ema:0.3", count)) == pytest.approx(1, abs=1e-14)


def test_ema_is_a_running_mean():
    values, mean = [3.0, -1.0, 4.0, 1.5], 3.0
    for v in values[1:]:
        mean = 0.2 * v + 0.8 * mean
    assert sum(c * v for c, v in zip(coefficients("ema:0.2", 4), values, strict=True)) == pytest.approx(mean, abs=1e-14)


@given(w=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_merging_is_the_decay_it_stands_for(w):
    """theta_n less every step scaled by its w, for steps of any size."""
    w = sorted(w, reverse=True)
    steps = [0.7 * (-1.3) ** i for i in range(len(w))]
    thetas = [2.0]
    for g in steps:
        thetas.append(thetas[-1] - g)
    merged = sum(c * t for c, t in zip(from_decay(w), thetas, strict=True))
    assert merged == pytest.approx(2.0 - sum(a * g for a, g in zip(w, steps, strict=True)), abs=1e-12)


@pytest.mark.parametrize("wrong", ["meen", "ema:2", "ema:x", "1,,1"])
def test_unknown_weightings_are_told(wrong):
    with pytest.raises(UserError, match="no such weighting"):
        coefficients(wrong, 3)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("0.5,0.5", "not as many weights as checkpoints[\\s\\S]*value: +2: 0.5,0.5\n +expected: 3 numbers"),
        ("1", "not as many weights"),
        ("0,0,0", "no weights of a mean"),
        ("nan,1,1", "no weights of a mean"),
        ("inf,1,1", "no weights of a mean"),
        ("1e308,1e308,1", "no weights of a mean"),
        ("-1,2,1", "none negative"),
    ],
)
def test_numbers_that_are_no_weights_are_told(wrong, told):
    with pytest.raises(UserError, match=told):
        coefficients(wrong, 3)


def test_a_decay_must_fall():
    with pytest.raises(UserError, match="falls from 1 to 0"):
        from_decay([0.5, 0.6])


def test_whole_numbers_must_be_equal_and_equal_tensors_stay():
    x = torch.randn(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weighted_sum([x, x, x], coefficients("1-sqrt", 3)), x)
    ids = torch.arange(3)
    assert torch.equal(weighted_sum([ids, ids], [0.5, 0.5]), ids)
    with pytest.raises(UserError, match="whole numbers"):
        weighted_sum([ids, ids + 1], [0.5, 0.5])
    with pytest.raises(UserError, match="different models"):
        weighted_sum([x, x[:3]], [0.5, 0.5])


def folder(path, seed, **changes):
    model = Ling(NANO.replace(**changes))
    model.init_weights(torch.Generator().manual_seed(seed))
    model.model.layers[1].mlp.gate.expert_bias.fill_(seed)
    return save(model, path, dtype=torch.bfloat16)


def test_folders_merge_to_a_folder(tmp_path, capsys):
    sources = [folder(tmp_path / str(i), i) for i in range(3)]
    out = tmp_path / "merged"
    assert main(["merge", *map(str, sources), str(out), "--weights", "1,2,1"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out) and "1,2,1 come to 4: scaled to come to 1, 0.25,0.5,0.25" in said.err
    models = [load(s).model.state_dict() for s in sources]
    merged = load(out).model.state_dict()
    for name, tensor in merged.items():
        expected = sum(c * m[name].double() for c, m in zip((0.25, 0.5, 0.25), models, strict=True))
        assert torch.equal(tensor, expected.float().to(tensor.dtype)), name
    assert float(merged["model.layers.1.mlp.gate.expert_bias"][0]) == 1.0
    told = json.loads((out / "openling.json").read_text())
    assert [m["weight"] for m in told["merged"]] == [0.25, 0.5, 0.25]
    assert main(["merge", *map(str, sources), str(tmp_path / "even"), "--weights", "0.1,0.7,0.2"]) == 0
    assert "scaled" not in capsys.readouterr().err
    with pytest.raises(UserError, match="exists already"):
        merge_folders(sources, out)
    other = folder(tmp_path / "other", 0, routed_scaling_factor=1.0)
    with pytest.raises(UserError, match="routed_scaling_factor"):
        merge_folders([sources[0], other], tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert main(["merge", str(sources[0]), str(tmp_path / "y"), "--last", "3"]) == 2
