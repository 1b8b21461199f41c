"""A recipe that names a teacher: its stages are the loop's, on one rank and on two, and what cannot be followed is refused."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from test_stages import go, recipe, rows

from openling.cli import main
from openling.config.recipe import read_recipe
from openling.errors import UserError
from openling.train import stages
from openling.train.loop import train
from openling.train.stages import Pipeline
from openling.weights.folder import load

FOLLOWING = [("stages.short.kl", "0.5"), ("stages.short.ce", "0.25"), ("stages.short.align", "0.1"), ("stages.short.mtp", "0")]
ON_RANKS = [("stages.short.batch_size", "4"), ("stages.long.batch_size", "4"), *FOLLOWING]
MESHES = {"shard": {}, "context": {"context": 2}, "tensor": {"tensor": 2}, "expert": {"expert": 2}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the recipe's text, and a teacher of the recipe's shape and other weights."""
    folder = tmp_path_factory.mktemp("teacher")
    outcome = go(folder, folder / "run", changes=[("seed", "7")])
    shutil.copytree(outcome.models[0], folder / "teacher")
    shutil.rmtree(folder / "run")
    recipe(folder)
    return folder


def followed(folder, run, changes):
    changed = read_recipe(folder / "small.toml", [("model.teacher", str(folder / "teacher")), *changes])
    return Pipeline(changed, run, device=torch.device("cpu"), progress=False).go()


def losses(run, stage="short"):
    lines = (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [[r[name] for name in ("loss", "ce", "kl", "align")] for r in map(json.loads, lines)]


def test_a_stage_that_follows_is_the_loop_with_a_teacher(place, tmp_path, monkeypatch):
    given = []

    def noted(model, config, batches, **options):
        given.append((model, config, batches, options, {name: value.clone() for name, value in model.state_dict().items()}))
        return train(model, config, batches, **options)

    monkeypatch.setattr(stages, "train", noted)
    outcome = followed(place, tmp_path / "run", FOLLOWING)
    model, config, batches, options, first = given[0]
    assert given[1][3]["teacher"] is None  # the second stage follows nobody
    assert all(p.grad is None for p in options["teacher"].parameters())
    model.load_state_dict(first)
    own, teacher = options["parameters"], load(place / "teacher").model.float()
    train(model, config, batches, teacher=teacher, parameters=own, run=tmp_path / "own", progress=False)
    lines = (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()
    wanted = [[r[name] for name in ("loss", "ce", "kl", "align")] for r in map(json.loads, lines)]
    assert losses(tmp_path / "run") == wanted and all(row[2] > 0 and row[3] > 0 for row in wanted)
    told = [json.loads((folder / "openling.json").read_text()) for folder in outcome.models]
    assert told[0]["teacher"] == str(place / "teacher") and "teacher" not in told[1]


def test_a_teacher_of_the_same_weights_has_nothing_to_say(place, tmp_path):
    followed(
        place, tmp_path / "run", [("model.folder", str(place / "teacher")), ("stages.short.kl", "1"), ("stages.short.mtp", "0")]
    )
    assert losses(tmp_path / "run")[0][2] == pytest.approx(0, abs=1e-6)


def two(rank, world, folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    rendezvous, limit = f"file://{folder}/rendezvous", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=limit)
    for name, mesh in MESHES.items():
        followed(folder, folder / name, [*ON_RANKS, ("parallel", json.dumps(mesh))])
    dist.barrier()
    dist.destroy_process_group()


def test_on_two_ranks_it_is_followed_as_on_one(place, tmp_path):
    """FP32; for the tolerance see test_stages_on_meshes."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    mp.start_processes(two, args=(2, str(tmp_path)), nprocs=2, start_method="forkserver")
    torch.set_num_threads(1)
    followed(tmp_path, tmp_path / "alone", ON_RANKS)
    for name in MESHES:
        for found, wanted in zip(losses(tmp_path / name), losses(tmp_path / "alone"), strict=True):
            assert found == pytest.approx(wanted, rel=1e-3), name
        assert len(rows(tmp_path / name, "long")) == 6


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([("model.teacher", "nowhere")], "nowhere"),
        ([("model.teacher", "")], "model.teacher"),
        ([("stages.short.kl", "0"), ("stages.short.align", "0"), ("stages.short.ce", "1")], "no stage follows the teacher"),
        ([("model.overrides.num_hidden_layers", "5")], "another shape[\\s\\S]*num_hidden_layers = 4[\\s\\S]*expected: 5"),
        ([("model.overrides.vocab_size", "300")], "other tokens[\\s\\S]*vocab_size"),
    ],
)
def test_what_cannot_be_followed_is_told_before_the_first_step(place, tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        followed(place, tmp_path / "run", [*FOLLOWING, *changes])
    assert not list(tmp_path.glob("run/stages/*"))


@pytest.mark.parametrize("name", ["model.teacher", "model.folder"])
def test_a_run_does_not_go_on_with_another_model_in_a_folder_that_it_reads(place, tmp_path, name):
    for copy in ("teacher", "student"):
        shutil.copytree(place / "teacher", tmp_path / copy)
    shutil.copy(place / "small.toml", tmp_path)
    changes = [*FOLLOWING, ("model.folder", str(tmp_path / "student"))]
    followed(tmp_path, tmp_path / "run", changes)
    path = tmp_path / name.replace("model.", "").replace("folder", "student") / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    changed = read_recipe(tmp_path / "small.toml", [("model.teacher", str(tmp_path / "teacher")), *changes])
    with pytest.raises(UserError, match=f"another model than when this run began[\\s\\S]*{name}"):
        Pipeline(changed, tmp_path / "run", device=torch.device("cpu"), progress=False).go(resume=True)


def test_a_teacher_that_is_cut_short_is_told_before_the_first_step(place, tmp_path):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors"):
        followed(tmp_path, tmp_path / "run", [("stages.long.kl", "1")])
    assert not list(tmp_path.glob("run/stages/*"))


def test_a_teacher_with_another_tokenizer_is_refused(place, tmp_path):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "teacher" / "tokenizer.json"
    path.write_text(path.read_text().replace('"Ġ"', '"Ĝ"', 1))
    with pytest.raises(UserError, match="another tokenizer[\\s\\S]*model.teacher"):
        followed(tmp_path, tmp_path / "run", FOLLOWING)


def test_a_dry_run_counts_the_teacher_and_misses_its_folder(place, tmp_path, capsys):
    words = ["train", str(place / "small.toml"), "--dry-run", "--stages.short.kl", "1", "--model.teacher"]
    assert main([*words, str(place / "teacher")]) == 0
    assert "forward pass of the teacher" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "absent")]) == 0
    assert f"not there yet: {tmp_path / 'absent'}" in capsys.readouterr().out
    world = ["--world", "2", "--stages.short.precision", "bf16", "--stages.long.precision", "bf16"]
    world += ["--stages.long.batch_size", "2"]
    assert main([*words, str(tmp_path / "absent"), *world]) == 0
    out = capsys.readouterr().out
    assert out.count("Not planned: the teacher, whose folder is not there.") == 1 and "teacher:" not in out
    assert main([*words, str(place / "teacher"), *world]) == 0
    out = capsys.readouterr().out
    assert main([*words, str(place / "teacher"), *world, "--parallel.tensor", "2"]) == 0
    shape = place / "teacher" / "config.json"
    (tmp_path / "odd").mkdir()
    odd = json.loads(shape.read_text()) | {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "group_norm_size": 4,
    }
    (tmp_path / "odd" / "config.json").write_text(json.dumps(odd))
    assert main([*words, str(tmp_path / "odd"), *world, "--parallel.tensor", "2"]) == 2
    assert "the teacher: " in capsys.readouterr().err
    short, long = out.partition("stage long")[::2]
    assert (
        "Not planned" not in out and "all-gather: teacher: weights" in short and "teacher: " not in long
    )  # which follows nobody
    assert main([*words, str(place / "teacher"), "--world", "2", "--parallel.pipeline", "2"]) == 2
    assert "teachers are not cut into pipeline stages" in capsys.readouterr().err
