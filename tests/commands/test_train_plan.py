"""`openling train --dry-run`: plans of a recipe's stages on ranks that do not exist, and refusals in the recipe's own names."""

import json
import re
from pathlib import Path

import pytest

from openling.cli import main
from openling.config.presets import PRESETS
from openling.config.recipe import read_recipe
from openling.model.families import read_config
from openling.plan.job import plan_training

RECIPES = Path(__file__).parents[2] / "recipes"
# 32 parts of 64 rows: for meshes of 8 stages on 512 ranks.
LARGE = ["1t", "--parallel.pipeline", "8", "--parallel.expert", "32", "--parallel.recompute", "layer"]
LARGE += ["--train.batch_size", "2048", "--train.accumulation", "32"]


def one_stage(tmp_path: Path, name: str) -> str:
    """The recipe with its first stage alone, and whatever batches that has left to [train]."""
    text = (RECIPES / f"{name}.toml").read_text()
    head, first, *_ = re.split(r"^(?=\[\[stages\]\])", text, flags=re.MULTILINE)
    first = re.sub(r"^(batch_size|accumulation|parallel) = .*\n", "", first, flags=re.MULTILINE)
    head = re.sub(r"^\[parallel\]\n(?:.+\n)*", "", head, flags=re.MULTILINE)
    head = re.sub(r"^(batch_size|accumulation) = .*\n", "", head, flags=re.MULTILINE)
    path = tmp_path / f"{name}.toml"
    path.write_text(head + first)
    return str(path)


def dry(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["train", *words, "--dry-run"])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_stage_is_planned_as_the_job_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = dry(capsys, one_stage(tmp_path, "1t"), *LARGE[1:], "--world", "512", "--gpu", "h200", "--gpu-memory", "300")
    assert code == 0
    plan = plan_training(
        read_config(PRESETS["ling-2.6-1t"]()), world=512, mesh="pipeline=8,expert=32", batch_tokens=2048 * 4096, micro_batch=1,
        device="h200", recompute="layer", gather="accumulate",
    )  # fmt: skip
    assert "1t, stage cpt" in out and "pipeline=8,shard=64,expert=32" in out
    step = re.search(r"A step takes ([\d.]+) (s|min)", out)
    assert float(step[1]) * (60 if step[2] == "min" else 1) == pytest.approx(plan.time.seconds, rel=0.01)
    # Every tensor kind has its row.
    names = {re.sub(r"^(model\.)?(layers\.\d+\.)?|\.weight$", "", t.name) for t in plan.inventory.tensors}
    assert all(f"\n{name} " in out for name in names)


def test_slices_of_unlike_length_are_planned_by_the_longest(tmp_path, capsys, monkeypatch):
    """As training takes them: 64 tokens on three ranks are 21, 21 and 22."""
    monkeypatch.setenv("COLUMNS", "100")
    one = "--stages.pretrain.mixture.length 64 --stages.pretrain.ramp null --train.batch_size 1 --train.accumulation 1"
    words = [*one.split(), "--stages.pretrain.precision", "bf16", "--parallel.context", "3"]
    code, out, err = dry(capsys, one_stage(tmp_path, "nano"), *words, "--world", "3")
    assert code == 0, err
    assert "1 x up to 22 tokens each" in out


@pytest.mark.parametrize("words", ["mini --world 8", "flash --world 128", "1t --world 2048 --gpu h200"])
def test_recipes_fit_the_machines_they_are_made_for(words, capsys):
    code, out, _ = dry(capsys, *words.split(), "--no-placement")
    assert code == 0 and out.count("A step takes") == 4 and "Not planned" not in out


@pytest.mark.parametrize(
    ("more", "where"),
    [
        (["--no-placement"], "stages.cpt.parallel.pipeline"),
        (["--gpu-memory", "90"], "stages.cpt.parallel.pipeline"),
        (["--parallel.recompute", "none", "--gpu", "h200"], "stages.cpt.parallel.recompute"),
        (["--train.accumulation", "8", "--gpu", "h200", "--gpu-memory", "127"], "stages.cpt.accumulation"),
    ],
)
def test_a_stage_that_does_not_fit_names_settings_that_help(more, where, tmp_path, capsys):
    words = [one_stage(tmp_path, "1t"), *LARGE[1:], "--world", "512", *more]
    code, out, err = dry(capsys, *words)
    assert code == 2 and "stage cpt does not fit" in err and where in re.search(r"where: +(.*)", err)[1].split(", ")
    assert not out
    assert ("next:" in err and "--gpu h200" in err) == (more == ["--no-placement"])
    nearest = re.search(r"nearest: +(.*)", err)[1].split()
    assert dry(capsys, *words, *nearest)[0] == 0


@pytest.mark.parametrize(
    ("words", "where", "nearest"),
    [
        (["nano", "--parallel.pipeline", "500", "--parallel.tensor", "3"], "parallel.tensor", "2"),
        (["1t", "--parallel.pipeline", "500"], "parallel.pipeline", "80"),
        (["nano", "--parallel.expert", "5"], "parallel.expert", "4"),
        (["nano", "--parallel.pipeline", "2"], "parallel.pipeline", None),
        (["1t", "--parallel.pipeline", "8", "--parallel.stages_per_rank", "11"], "parallel.stages_per_rank", None),
        (["nano", "--world", "3"], "stages.pretrain.batch_size / accumulation", "--stages.pretrain.batch_size 15"),
        (["nano", "--world", "4", "--parallel.shard", "3"], "parallel.shard", "4"),
        (["nano", "--world", "1"], "stages.pretrain.precision", "--stages.pretrain.precision bf16"),
        (["nano", "--world", "0"], "--world", None),
    ],
)
def test_a_mesh_that_cannot_be_names_its_setting(words, where, nearest, capsys):
    code, out, err = dry(capsys, *words)
    assert (code, out) == (2, "") and re.search(r"where: +(.*)", err)[1] == where
    found = re.search(r"nearest: +(.*)", err)
    assert (found and found[1]) == nearest


def test_meshes_are_checked_without_a_world(capsys):
    code, out, _ = dry(capsys, "nano", "--parallel.expert", "4", "--parallel.replicate", "2", "--stages.mid3.batch_size", "2")
    assert code == 0 and read_recipe(RECIPES / "nano.toml").name == json.loads(out[: out.index("\n}") + 2])["name"]
    assert main(["train", "nano", "--world", "2"]) == 2
    assert "--dry-run" in capsys.readouterr().err
