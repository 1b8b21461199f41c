"""A recipe from text to checkpoint folders: stages follow one another, a kill anywhere changes nothing, merges are the means."""

import json
import multiprocessing
import os
import random
import shlex
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openling.cli import main
from openling.config.recipe import read_recipe
from openling.data.build import BuildConfig, build
from openling.data.byte_tokenizer import byte_tokenizer
from openling.data.sources import Source
from openling.errors import UserError
from openling.train.loop import TrainResult
from openling.train.stages import Outcome, Pipeline
from openling.weights.folder import load
from openling.weights.merge import coefficients

# How often the run is killed: `OPENLING_KILLS=20 pytest tests/train/test_stages.py` for the long form.
KILLS = int(os.environ.get("OPENLING_KILLS", "3"))
RECIPE = """
name = "small"
[model]
preset = "tiny"
overrides = {{ num_hidden_layers = 4, hidden_size = 32, intermediate_size = 48, q_lora_rank = 16, initializer_range = 0.05 }}
tokenizer = "bytes"
dtype = "float32"
[corpora.texts]
build = ["story={folder}/story.txt"]
[[sources]]
corpus = "texts"
repeat = 1000
[train]
batch_size = 2
lr = 2e-3
mtp = 0.1
bias_rate = 1e-3
precision = "fp32"
keep_last = 3
checkpoint_steps = 2
[[stages]]
name = "short"
steps = {steps}
warmup_steps = 2
mixture = {{ length = 32 }}
[[stages]]
name = "long"
steps = {steps}
batch_size = 1
mixture = {{ length = 64 }}
rope_theta = 20000.0
yarn = {{ factor = 2.0, original = 32 }}
max_position_embeddings = 64
merge = {{ last = 3, weights = "1-sqrt" }}
"""


def recipe(folder, steps=6):
    rng = np.random.default_rng(0)
    words = ["lamp", "river", "stone", "under", "walks", "the", "a", "and"]
    if not (folder / "story.txt").exists():
        (folder / "story.txt").write_text(" ".join(rng.choice(words, 400)))
    path = folder / "small.toml"
    path.write_text(RECIPE.format(folder=folder, steps=steps))
    return read_recipe(path)


def go(folder, run, *, resume=False, steps=6, changes=()):
    recipe(folder, steps)
    changed = read_recipe(folder / "small.toml", changes)
    pipeline = Pipeline(changed, run, device=torch.device("cpu"), progress=False)
    return pipeline.go(resume=resume)


def rows(run, stage):
    lines = (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [{k: r[k] for k in ("step", "tokens", "loss", "mtp", "grad_norm", "lr")} for r in map(json.loads, lines)]


def test_stages_follow_one_another_and_merge(tmp_path):
    run = tmp_path / "run"
    outcome = go(tmp_path, run)
    assert [p.name for p in outcome.models] == ["short", "long"] and outcome.stopped is None
    short, long = (load(p) for p in outcome.models)
    assert short.config.rope_theta == 6e6 and short.config.rope_scaling is None
    assert long.config.rope_theta == 20000.0 and long.config.max_position_embeddings == 64
    assert long.config.rope_scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    assert long.tokenizer is not None
    # The first stage's folder holds its last weights; the second began with them and their moments.
    last = load_file(run / "stages" / "short" / "checkpoints" / "step_6" / "model.safetensors")
    for name, tensor in last.items():
        assert torch.equal(dict(short.model.state_dict())[name], tensor), name
    moments = load_file(run / "stages" / "long" / "checkpoints" / "step_6" / "optimizer.safetensors")
    assert float(moments["step/lm_head.weight"]) == 12
    # The second stage's folder is the weighted mean of its last three checkpoints.
    parts = [load_file(run / "stages" / "long" / "checkpoints" / f"step_{s}" / "model.safetensors") for s in (2, 4, 6)]
    weights = coefficients("1-sqrt", 3)
    state = long.model.state_dict()
    for name in parts[0]:
        mean = sum(c * p[name].double() for c, p in zip(weights, parts, strict=True))
        torch.testing.assert_close(state[name], mean.float(), atol=0, rtol=2**-23)
    assert any("expert_bias" in name and float(state[name].abs().max()) > 0 for name in parts[0])
    told = json.loads((run / "models" / "long" / "openling.json").read_text())
    assert [m["step"] for m in told["merged"]] == [2, 4, 6] and told["tokens"] == 6 * 64
    with pytest.raises(UserError, match="holds a run already"):
        go(tmp_path, run)
    # Finished stages are left alone; a longer last stage goes on.
    before = (run / "models" / "short" / "model.safetensors").stat().st_mtime_ns
    assert go(tmp_path, run, resume=True).stopped is None
    assert (run / "models" / "short" / "model.safetensors").stat().st_mtime_ns == before


def test_the_best_checkpoints_on_a_text_are_merged(tmp_path, capsys):
    go(tmp_path, tmp_path / "run")
    stage, text = tmp_path / "run" / "stages" / "long", tmp_path / "story.txt"
    assert main(["merge", str(stage), str(tmp_path / "best"), "--best", "2", "--eval-text", str(text), "--dtype", "float32"]) == 0
    told = json.loads((tmp_path / "best" / "openling.json").read_text())
    losses = {int(step): loss for step, loss in told["held_out"]["losses"].items()}
    assert [m["step"] for m in told["merged"]] == sorted(sorted(losses, key=losses.get)[:2])
    assert set(losses) == {2, 4, 6}
    assert "step 4: " in capsys.readouterr().err
    # The loss is that of the folder that each checkpoint alone makes.
    assert main(["merge", str(stage), str(tmp_path / "one"), "--steps", "4", "--dtype", "float32"]) == 0
    one, tokens = load(tmp_path / "one"), told["held_out"]["tokens"]
    windows = torch.tensor(one.tokenizer(text.read_text()).input_ids[:tokens]).view(-1, 64)
    with torch.inference_mode():
        logits = one.model(windows)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert losses[4] == pytest.approx(float(expected), rel=1e-5)
    for words in (
        ["--last", "0"],
        ["--last", "-2"],
        ["--steps", ""],
        ["--steps", "2,5"],
        ["--best", "2"],
        ["--eval-text", str(text)],
        ["--best", "9", "--eval-text", str(text)],
    ):
        assert main(["merge", str(stage), str(tmp_path / "no"), *words]) == 2
    assert not (tmp_path / "no").exists()
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "no")]) == 2
    assert f"nearest:  {tmp_path / 'run' / 'stages' / 'short'}" in capsys.readouterr().err


def test_nothing_to_resume_and_changed_recipes_are_told(tmp_path):
    with pytest.raises(UserError, match="nothing to resume[\\s\\S]*without --resume"):
        go(tmp_path, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("stages.long.trainable", '["nothing"]', "no parameter has this name"),
        ("stages.long.trainable", '["("]', "no regular expression: missing"),
        ("stages.long.kl", "1", "needs a teacher[\\s\\S]*model.teacher"),
        ("stages.long.merge.weights", "sqrt", "no such weighting[\\s\\S]*nearest: +1-sqrt"),
        ("stages.long.merge.last", "4", "fewer checkpoints[\\s\\S]*at most 3"),
        ("model.overrides.num_nextn_predict_layers", "0", "no MTP layer"),
        ("stages.long.tokens", "1e7", "cannot be met"),
    ],
)
def test_what_a_later_stage_cannot_do_is_told_before_the_first_step(tmp_path, name, value, told):
    with pytest.raises(UserError, match=told) as error:
        go(tmp_path, tmp_path / "run", changes=[(name, value)])
    assert str(error.value.parts["where"]).startswith("stages.")
    assert not list(tmp_path.glob("run/stages/*"))


def test_a_last_step_that_is_kept_twice_over_is_one_checkpoint(tmp_path):
    changes = [("stages.long.keep_last", "1"), ("stages.long.keep_every", "2"), ("stages.long.merge.last", "4")]
    with pytest.raises(UserError, match="fewer checkpoints[\\s\\S]*at most 3"):
        go(tmp_path, tmp_path / "run", changes=changes)
    changes[-1] = ("stages.long.merge.last", "3")
    assert len(go(tmp_path, tmp_path / "run", changes=changes).models) == 2


@pytest.mark.parametrize("damage", ["one byte", "cut"])
def test_a_damaged_shard_of_a_later_stage_is_told_before_the_first_step(tmp_path, damage):
    recipe(tmp_path)
    (tmp_path / "later.txt").write_text("lamp river stone " * 200)
    corpus = tmp_path / "later"
    build(BuildConfig((Source("later", str(tmp_path / "later.txt"), "MIT", "en"),)), corpus, byte_tokenizer())
    shard = corpus / "000000.safetensors"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] if damage == "cut" else sound[:-1] + bytes([sound[-1] ^ 1]))
    changes = [("stages.long.mixture.sources", json.dumps([{"corpus": str(corpus), "repeat": 1000}]))]
    told = "cut short" if damage == "cut" else "damaged[\\s\\S]*sampled blocks differ"
    with pytest.raises(UserError, match=told) as error:
        go(tmp_path, tmp_path / "run", changes=changes)
    assert error.value.parts["where"] == f"stages.long, {shard}"
    assert not list(tmp_path.glob("run/stages/*"))
    shard.write_bytes(sound)
    go(tmp_path, tmp_path / "run", resume=True, changes=changes)


@pytest.mark.parametrize("axis", ["pipeline", "shard", "expert"])
def test_one_process_is_no_mesh(tmp_path, axis):
    with pytest.raises(UserError, match=f"parallel.{axis}[\\s\\S]*torchrun"):
        go(tmp_path, tmp_path / "run", changes=[(f"parallel.{axis}", "2")])


def test_a_run_without_a_step_begins_anew_with_another_recipe(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="cannot be met"):
        go(tmp_path, run, changes=[("stages.long.tokens", "1e7")])
    assert (run / "recipe.json").exists()
    with pytest.raises(UserError, match="built this corpus from something else[\\s\\S]*remove"):
        go(tmp_path, run, changes=[("corpora.texts.build", '["kjv"]')])
    go(tmp_path, run, changes=[("seed", "3"), ("stages.short.lr", "1e-3")])
    assert json.loads((run / "recipe.json").read_text())["recipe"]["seed"] == 3


def test_what_has_begun_stays_as_it_was(tmp_path):
    run = tmp_path / "run"
    go(tmp_path, run)
    record = (run / "recipe.json").read_text().replace('"by": null,\n', "")  # as before sources could be divided
    (run / "recipe.json").write_text(record)
    for name, value, told in (
        ("stages.short.lr", "1e-3", "begun with another setting"),  # finished, and would be left alone
        ("stages.long.rope_theta", "3e4", "begun with another setting"),
        ("stages.long.yarn.factor", "4", "begun with another setting"),
        ("stages.long.batch_size", "2", "begun with another setting"),
        ("stages.long.mixture.length", "32", "begun with another"),
        ("stages.short.steps", "8", "next stage has begun"),
        ("stages.long.steps", "4", "trained for longer"),
        ("stages.long.merge.last", "2", "merged already[\\s\\S]*openling merge"),
        ("stages.short.name", "first", "order of the stages"),
        ("model.overrides.hidden_size", "64", "model.overrides.hidden_size\\n.*64\\n.*32"),
        ("seed", "1", "the recipe has changed"),
    ):
        with pytest.raises(UserError, match=told):
            go(tmp_path, run, resume=True, changes=[(name, value)])
    assert (run / "recipe.json").read_text() == record
    shutil.move(run / "corpora" / "texts", tmp_path / "elsewhere")
    moved = [("corpora.texts", json.dumps({"path": str(tmp_path / "elsewhere")}))]
    changes = [*moved, ("stages.long.steps", "8"), ("stages.long.merge.last", "2"), ("sources.0.repeat", "2000")]
    own = json.dumps([{"corpus": "gone", "group": "all", "repeat": 1000}])
    changes += [("corpora.gone.path", '"gone"'), ("stages.short.mixture.sources", own)]  # what a finished stage read may go
    go(tmp_path, run, resume=True, changes=changes)
    told = json.loads((run / "models" / "long" / "openling.json").read_text())
    assert told["steps"] == 8 and [m["step"] for m in told["merged"]] == [6, 8]


def test_a_stage_that_the_clock_ended_goes_on_with_another_clock(tmp_path):
    run, said = tmp_path / "run", []
    plain = [("stages.long.merge", "null")]

    def steps(stage):
        return json.loads((run / "models" / stage / "openling.json").read_text())["steps"]

    def resume(name, seconds):
        changed = read_recipe(tmp_path / "small.toml", [*plain, ("stages.short.max_seconds", "1e9"), (name, seconds)])
        Pipeline(changed, run, device=torch.device("cpu"), say=said.append, progress=False).go(resume=True)

    go(tmp_path, run, changes=[*plain, ("stages.long.max_seconds", "1e-9")])
    assert (steps("short"), steps("long")) == (6, 1)
    resume("stages.long.max_seconds", "1e-9")  # the clock of a stage that came to its end may change
    assert steps("long") == 1 and "stage long was ended by its clock (max_seconds = 1e-09): 1 of 6 steps" in said
    resume("stages.long.max_seconds", "1e-8")  # spent already
    assert steps("long") == 1
    shutil.copytree(run / "models" / "long", tmp_path / "cut")
    resume("stages.long.max_seconds", "100")
    assert steps("long") == 6 and [row["step"] for row in rows(run, "long")] == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(run / "models" / "long")
    shutil.move(tmp_path / "cut", run / "models" / "long")  # as if killed before it was written again
    resume("stages.long.max_seconds", "1e-8")
    assert steps("long") == 6
    longer = [("stages.long.max_seconds", "100"), ("stages.long.steps", "8")]  # no clock has ended it
    go(tmp_path, run, resume=True, changes=[*plain, *longer])
    assert steps("long") == 8


@pytest.mark.parametrize("seconds", ["100", "null"])
def test_the_clock_of_a_stage_stays_once_the_next_has_begun(tmp_path, seconds):
    run, cut = tmp_path / "run", [("stages.short.max_seconds", "1e-9")]
    go(tmp_path, run, changes=cut)
    before = files_of(run)
    with pytest.raises(UserError, match="next stage has begun[\\s\\S]*stages.short.max_seconds[\\s\\S]*remove the later stages"):
        go(tmp_path, run, resume=True, changes=[("stages.short.max_seconds", seconds)])
    assert files_of(run) == before
    go(tmp_path, run, resume=True, changes=cut)
    for part in ("stages", "models"):
        shutil.rmtree(run / part / "long")
    go(tmp_path, run, resume=True, changes=[("stages.short.max_seconds", seconds)])
    assert [row["step"] for row in rows(run, "short")] == [1, 2, 3, 4, 5, 6]
    assert (run / "models" / "long").exists()


def test_the_command_that_goes_on_can_be_pasted(tmp_path, monkeypatch, capsys):
    recipe(tmp_path)
    run = tmp_path / "my runs" / "one"
    words = ["train", str(tmp_path / "small.toml"), "--out", str(run), "--stages.long.steps", "7", "--device", "cpu"]
    stopped = TrainResult(3, 96, 1.0, "signal", 2, {})
    monkeypatch.setattr(Pipeline, "go", lambda self, *, resume: Outcome([], stopped))
    assert main(words) == 130
    assert f"next:     {shlex.join(['openling', *words])} --resume\n" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 130
    assert f"next:     {shlex.join(['openling', *words])} --resume\n" in capsys.readouterr().err
    monkeypatch.setattr(Pipeline, "go", lambda self, *, resume: Outcome([run / "models" / "long"], None))
    assert main(words) == 0
    assert f"openling generate '{run / 'models' / 'long'}' 'Once upon a time'" in capsys.readouterr().err


@pytest.mark.parametrize("record", ["recipe.json", "stages/long/train.json", "models/short/openling.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_record_is_named(tmp_path, record, text):
    run = tmp_path / "run"
    go(tmp_path, run)
    shutil.rmtree(run / "models" / "long")
    (run / record).write_text(text)
    if (record, text) == ("models/short/openling.json", "{}"):
        go(tmp_path, run, resume=True)  # written again
        return
    with pytest.raises(UserError, match=f"record[\\s\\S]*where: +{run / record}"):
        go(tmp_path, run, resume=True)


def files_of(run):
    """Everything that a run has written down, by path."""
    return {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("cut", [lambda p: os.truncate(p, p.stat().st_size - 1), lambda p: os.truncate(p, 40), os.unlink])
def test_a_finished_model_that_was_cut_short_is_written_again(tmp_path, cut):
    run, said = tmp_path / "run", []
    go(tmp_path, run)
    shutil.rmtree(run / "corpora")  # nothing is trained for it
    paths = [run / "models" / name / "model.safetensors" for name in ("short", "long")]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        cut(path)
    gone = [("corpora.texts", '{"path": "gone"}')]
    changed = read_recipe(tmp_path / "small.toml", gone)
    Pipeline(changed, run, device=torch.device("cpu"), say=said.append, progress=False).go(resume=True)
    assert [path.read_bytes() for path in paths] == whole
    assert sum("is finished, but" in text for text in said) == 2


def test_a_finished_model_that_cannot_be_written_again_is_told(tmp_path):
    run = tmp_path / "run"
    go(tmp_path, run)
    shutil.rmtree(run / "stages" / "long" / "checkpoints" / "step_2")  # its model is the mean of steps 2, 4 and 6
    weights = run / "models" / "long" / "model.safetensors"
    os.truncate(weights, 1000)
    told = (
        rf"damaged or truncated[\s\S]*where: +{weights}\n[\s\S]*without step 2[\s\S]*step_2\n[\s\S]*or remove {weights.parent}:"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=told):
            go(tmp_path, run, resume=True)
    assert weights.stat().st_size == 1000
    shutil.rmtree(weights.parent)
    with pytest.raises(UserError, match="fewer checkpoints[\\s\\S]*a smaller .*merge.last"):
        go(tmp_path, run, resume=True)
    go(tmp_path, run, resume=True, changes=[("stages.long.merge.last", "2")])
    assert weights.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_its_recipe_is_told_what_is_missing(tmp_path, resume):
    run = tmp_path / "run"
    go(tmp_path, run)
    (run / "recipe.json").unlink()
    with pytest.raises(UserError, match=f"where: +{run}/recipe.json[\\s\\S]*put recipe.json back, or choose a new --out"):
        go(tmp_path, run, resume=resume)


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_without_their_settings_are_refused_and_nothing_is_written(tmp_path, resume):
    run = tmp_path / "run"
    go(tmp_path, run)
    shutil.rmtree(run / "models" / "long")
    for name in ("short", "long"):
        (run / "stages" / name / "train.json").unlink()
    before = files_of(run)
    told = "train.json[\\s\\S]*put it back, or remove .*stages/long and train" if resume else "add --resume"
    with pytest.raises(UserError, match=told):
        go(tmp_path, run, resume=resume, changes=[] if resume else [("stages.long.lr", "1e-3")])
    assert files_of(run) == before
    shutil.rmtree(run / "stages" / "long")
    go(tmp_path, run, resume=True)
    assert (run / "models" / "long").exists()


def test_a_stray_folder_among_checkpoints_is_told_and_put_aside(tmp_path):
    run, said = tmp_path / "run", []
    go(tmp_path, run)
    (run / "stages" / "long" / "checkpoints" / "step_99").mkdir()
    changed = recipe(tmp_path)
    Pipeline(changed, run, device=torch.device("cpu"), say=said.append, progress=False).go(resume=True)
    assert sum("step_99: it has no manifest.json" in text for text in said) == 1
    assert (run / "stages" / "long" / "checkpoints" / "damaged_step_99").is_dir()


def test_a_finished_stage_without_checkpoints_is_told(tmp_path):
    run = tmp_path / "run"
    go(tmp_path, run)
    shutil.rmtree(run / "stages" / "short" / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint[\\s\\S]*models/short: model.folder"):
        go(tmp_path, run, resume=True)


def _child(folder, run, resume, steps):
    torch.set_num_threads(1)
    go(folder, run, resume=resume, steps=steps)


def logged(run):
    """Steps in the logs of all stages."""
    return sum(path.read_text().count("\n") for path in run.glob("stages/*/metrics.jsonl"))


def ready_processes():
    """Where processes start that have what a run imports."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["openling.train.stages", "torch._dynamo"])
    return processes


def kill_somewhere(child, run, rng):
    """Before the first step or a few steps on, at any moment of one."""
    ahead = rng.randrange(8)
    wanted = logged(run) + ahead
    while child.is_alive() and logged(run) < wanted:
        time.sleep(0.005)
    child.join(rng.uniform(0, 0.1 if ahead else 1.5))
    assert child.exitcode is None, f"the child ended by itself with {child.exitcode}"
    child.kill()
    child.join()


def assert_same_run(one, two):
    """The same steps and, to the bit, the same weights of both stages."""
    for stage in ("short", "long"):
        assert rows(one, stage) == rows(two, stage)
        here, there = (load_file(run / "models" / stage / "model.safetensors") for run in (one, two))
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def test_a_run_killed_at_random_ends_with_the_same_weights(tmp_path):
    run, rng, steps = tmp_path / "killed", random.Random(1), 8 * KILLS
    processes = ready_processes()
    for _ in range(KILLS):
        child = processes.Process(target=_child, args=(tmp_path, run, (run / "recipe.json").exists(), steps))
        child.start()
        kill_somewhere(child, run, rng)
    go(tmp_path, run, resume=(run / "recipe.json").exists(), steps=steps)
    go(tmp_path, tmp_path / "straight", steps=steps)
    assert_same_run(run, tmp_path / "straight")
