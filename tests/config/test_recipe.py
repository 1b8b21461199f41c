"""Recipes: every mistake is told with its place and the nearest valid name; those that come with openling are whole."""

import re
from pathlib import Path

import pytest

from openling.cli import main
from openling.commands.train import changes, find_recipe
from openling.config.recipe import read_recipe, resolve
from openling.errors import UserError
from openling.train.rules import check_mesh, check_stages
from openling.train.stages import first_config

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = """
name = "small"
[model]
preset = "tiny"
tokenizer = "bytes"
[corpora.texts]
build = ["kjv"]
[[sources]]
corpus = "texts"
[train]
batch_size = 4
lr = 1e-3
[[stages]]
name = "one"
steps = 5
mixture = { length = 64 }
[[stages]]
name = "two"
tokens = 1e4
lr = 2e-4
mixture = { length = 32, long = { length = 128, share = 0.2 } }
"""


def small(folder, text=SMALL, **settings):
    path = folder / "small.toml"
    path.write_text(text)
    return read_recipe(path, [(name.replace("__", "."), value) for name, value in settings.items()])


def test_defaults_stages_and_changes_from_the_command_line(tmp_path):
    recipe = small(tmp_path)
    one, two = recipe.stages
    assert (one.lr, two.lr, one.batch_size, one.sequence_length, two.sequence_length) == (1e-3, 2e-4, 4, 64, 128)
    assert (one.total_steps, two.total_steps) == (5, 20)
    assert one.mixture.sources == two.mixture.sources
    changed = small(
        tmp_path, train__lr="3e-4", stages__one__tokens="512", stages__two__mixture__length="64", model__dtype="float32"
    )
    assert [s.lr for s in changed.stages] == [3e-4, 2e-4]
    assert changed.stages[0].total_steps == 2 and changed.stages[0].steps is None
    assert changed.stages[1].mixture.length == 64 and changed.model.dtype == "float32"
    assert changes(["a.b=1"], ["--c.d", "2", "--e.f=3"]) == [("a.b", "1"), ("c.d", "2"), ("e.f", "3")]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("lr = 1e-3", "lrr = 1e-3", ["train.lrr", "nearest:  train.lr"]),
        ("steps = 5", "stepz = 5", ["stages.one.stepz", "nearest:  stages.one.steps"]),
        ("[model]", "[modell]", ["modell", "nearest:  model"]),
        ('preset = "tiny"', 'presett = "tiny"', ["model.presett", "nearest:  model.preset"]),
        ('preset = "tiny"', 'preset = "tinny"', ["did you mean 'tiny'"]),
        ("mixture = { length = 64 }", "mixture = { lenght = 64 }", ["lenght", "nearest:  length"]),
        ('[[sources]]\ncorpus = "texts"', '[[sources]]\ncorpus = "text"', ["no such corpus", "nearest:  texts"]),
        ('name = "two"', 'name = "one"', ["two stages are named one"]),
        ("steps = 5", "steps = 5\ntokens = 7", ["exactly one of steps and tokens"]),
        ("steps = 5", "steps = 5\nsequence_length = 32", ["64, or leave it out"]),
        ("batch_size = 4", "batch_size = ", ["not TOML"]),
        ("batch_size = 4", "batch_size = 0", ["train.batch_size", "greater than 0"]),
        ("lr = 2e-4", "lr = nan", ["stages.two.lr", "finite"]),
        ("lr = 2e-4", "betas = [0.9, 1.5]", ["stages.two.betas.1", "less than 1"]),
        ("batch_size = 4", "batch_size = true", ["train.batch_size", "no switch"]),
        ('name = "two"', 'name = ".."', ["..", "letters, digits"]),
        ('name = "two"', 'name = "one"', ["value:    one, one"]),
        ('name = "small"', 'name = "small"\ntrackers = ["wand"]', ["trackers.0", "nearest:  wandb"]),
        ('name = "small"', 'name = "small"\ntrackers = "wandb"', ["trackers", "a list"]),
        (
            'name = "small"',
            'name = "small"\ntrackers = ["wandb", "trackio", "wandb"]',
            ["trackers", "each tracker once", "nearest:  ['wandb', 'trackio']"],
        ),
        ("steps = 5", "steps = 5\nramp = { start = 8, tokens = 64 }", ["stages.one", "nearest:  ramp.start = 4"]),
        (
            "tokens = 1e4",
            "tokens = 1e4\nmax_position_embeddings = 100",
            ["stages.two.max_position_embeddings", "value:    100", "at least 128", "nearest:  128"],
        ),
        (
            "steps = 5",
            "steps = 5\nramp = { start = 1, tokens = 64, stairs = 100000000 }",
            ["stages.one.ramp.stairs", "less than or equal to 1000", "nearest:  1000"],
        ),
        ("steps = 5", "steps = 5\nkeep_every = 5\ncheckpoint_steps = 3", ["multiple", "nearest:  keep_every = 6"]),
        ("batch_size = 4", "batch_size = 12\naccumulation = 5", ["does not divide", "nearest:  accumulation = 4"]),
        ("batch_size = 4", "batch_size = 99999999999999\naccumulation = 7", ["does not divide", "nearest:  accumulation = 3"]),
        ("steps = 5", "steps = 5\nkeep_every = 5", ["multiple", "nearest:  checkpoint_steps = 5"]),
        ("steps = 5", "steps = 5\nyarn = { factr = 2, original = 64 }", ["unknown setting", "yarn.factr", "nearest:  factor"]),
        ("steps = 5", "steps = 5\nbetas = [false, 0.9]", ["stages.one.betas", "no switch"]),
        ('name = "small"', 'name = "small"\nseed = true', ["seed", "no switch"]),
        ("mixture = { length = 64 }", "mixture = { length = 64, shares = { all = true } }", ["mixture", "no switch"]),
        (
            "mixture = { length = 64 }",
            "mixture = { shares = { al = 0.5, all = 0.5 } }",
            ["no source has this group", "stages.one.mixture.shares", "value:    al", "nearest:  all"],
        ),
        (
            "mixture = { length = 64 }",
            "mixture = { shares = { all = -0.5 } }",
            ["stages.one.mixture, shares.all", "value:    -0.5", "greater than 0"],
        ),
        ("mixture = { length = 64 }", "mixture = { preset = 3 }", ["no such mixture", "stages.one.mixture", "value:    3"]),
        ('[[sources]]\ncorpus = "texts"', "", ["stages.one.mixture", "1 or more of them"]),
        ('preset = "tiny"', 'preset = "tiny"\noverrides = { hiden_size = 64 }', ["did you mean 'hidden_size'"]),
        ('[corpora.texts]\nbuild = ["kjv"]', "[corpora]\ntexts = 3", ["no table", "corpora.texts", "value:    3"]),
        ("mixture = { length = 64 }", "mixture = 3", ["stages.one.mixture", "value:    3", "[stages.one.mixture]"]),
        ("mixture = { length = 64 }", "mixture = { shares = 3 }", ["no table", "stages.one.mixture.shares"]),
        ("mixture = { length = 64 }", "mixture = { length = 64, long = 3 }", ["no table", "stages.one.mixture.long"]),
    ],
)
def test_mistakes_are_told(tmp_path, old, new, told):
    assert old in SMALL
    with pytest.raises(UserError) as error:
        small(tmp_path, SMALL.replace(old, new, 1))
    for words in told:
        assert words in str(error.value)


def test_a_stage_s_own_mesh_and_recomputing(tmp_path):
    parallel = '[parallel]\nexpert = 2\nrecompute = "selective"\n[[stages]]\nname = "one"\n'
    text = SMALL.replace('[[stages]]\nname = "one"\n', parallel)
    recipe = small(tmp_path, text, stages__two__parallel__recompute="layer", stages__two__parallel__context="4")
    one, two = map(recipe.parallel_of, recipe.stages)
    assert one == recipe.parallel and recipe.stages[0].parallel is None
    assert (two.expert, two.context, two.recompute, two.gather) == (2, 4, "layer", "accumulate")
    again = resolve(recipe.model_dump(mode="json"))  # as a run's record has it
    assert [again.parallel_of(stage) for stage in again.stages] == [one, two]


@pytest.mark.parametrize(
    ("changed", "world", "ranks"),
    [
        ({}, 4, (4, 1)),
        ({"context": 2}, 4, (2, 2)),
        ({"rest": '"context"'}, 4, (1, 4)),
        ({"rest": '"context"', "shard": 2, "replicate": 2}, 8, (2, 2)),
        ({"rest": '"context"'}, 1, (1, 1)),
    ],
)
def test_ranks_that_are_left(tmp_path, changed, world, ranks):
    recipe = small(tmp_path, **{f"parallel__{name}": str(value) for name, value in changed.items()})
    axes = check_mesh(recipe, recipe.stages[0], first_config(recipe)[0], world)
    assert (axes.data_shard, axes.context, axes.world) == (*ranks, world)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("stages__two__parallel", '{"rest": "context", "context": 2}', "leave one of them out"),
        ("stages__two__learning_rate", "1e-3", "nearest: +stages.two.lr"),
        ("stages__two__parallel__recomput", "layer", "nearest: +stages.two.parallel.recompute"),
        ("stages__two__parallel__recompute", "all", "stages.two.parallel.recompute\n.*all"),
        ("stages__two__parallel__rest", "contxt", "stages.two.parallel.rest\n[\\s\\S]*nearest: +context"),
        ("stages__two__parallel__context", "true", "no switch"),
        ("stages__two__parallel", "3", "no table[\\s\\S]*stages.two.parallel"),
        ("train__parallel__context", "2", "unknown setting[\\s\\S]*train.parallel"),
    ],
)
def test_mistakes_in_a_stage_s_parallel_are_told(tmp_path, name, value, told):
    with pytest.raises(UserError, match=told):
        small(tmp_path, **{name: value})


def test_a_stage_s_mesh_must_go_with_the_recipe_s_gather(tmp_path):
    text = SMALL.replace("[train]", '[parallel]\ngather = "step"\n[train]')
    with pytest.raises(UserError, match="pipeline do not go together") as error:
        small(tmp_path, text, stages__two__parallel__pipeline="2")
    assert "stages.two.parallel" in str(error.value)


def test_stages_per_rank_need_a_pipeline_somewhere(tmp_path):
    """A stage may replace either part of it."""
    with pytest.raises(UserError, match="no stage has one\n +nearest: +parallel.stages_per_rank = 1"):
        small(tmp_path, parallel__stages_per_rank="2")
    one, two = small(tmp_path, parallel__stages_per_rank="2", stages__one__parallel='{"pipeline": 2}').stages
    assert one.parallel.stages_per_rank == 2 and two.parallel is None
    recipe = small(tmp_path, parallel='{"stages_per_rank": 2, "pipeline": 2}', stages__one__parallel='{"pipeline": 1}')
    assert [recipe.parallel_of(stage).pipeline for stage in recipe.stages] == [1, 2]


@pytest.mark.parametrize("name", ["train", "model", "corpora", "sources", "stages"])
@pytest.mark.parametrize("value", ["3", "[3]"])
def test_what_is_no_table_is_told(tmp_path, name, value):
    with pytest.raises(UserError, match="no table") as error:
        small(tmp_path, **{name: value})
    assert name in str(error.value)


def test_mistakes_on_the_command_line(tmp_path, capsys):
    with pytest.raises(UserError, match="nearest: +one"):
        small(tmp_path, stages__onee__lr="1")
    with pytest.raises(UserError, match="no such recipe[\\s\\S]*nearest: +nano"):
        find_recipe("nanoo")
    assert main(["train", "nano", "--set", "train.betaz=3"]) == 2
    assert "nearest:  train.betas" in capsys.readouterr().err
    assert main(["train", "nano", "--resum"]) == 2
    assert "nearest:  --resume" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nano", "mini", "flash", "1t"])
def test_recipes_are_whole(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(RECIPES / f"{name}.toml")
    assert recipe.name == name
    first, *mid = recipe.stages
    assert [s.bias_rate / first.bias_rate for s in mid] == pytest.approx([0.1] * 3)
    assert {s.mtp for s in recipe.stages} == {0.1} and {s.schedule for s in recipe.stages} == {"constant"}
    assert mid[0].mixture.long.share == 0.2 and mid[0].mixture.long.of == "sequences"
    if name != "nano":
        assert [s.tokens for s in recipe.stages] == [8 * 10**12, 250 * 10**9, 425 * 10**9, 525 * 10**9]
        assert [s.sequence_length for s in recipe.stages] == [4096, 32768, 32768, 262144]
        assert len({s.batch_size * s.sequence_length for s in recipe.stages}) == 1  # one batch in tokens
    assert main(["train", name, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert [len(re.findall(rf"^{s.name} ", out, re.MULTILINE)) for s in recipe.stages] == [2] * 4  # what it costs, and its mesh
    assert "FLOPs in all" in out and ("not there yet" in out) == (name != "nano")
    assert not list(tmp_path.iterdir())


# What docs/parallel.md says of each recipe: worlds, and what is to be set there. The first is what its mesh was chosen for.
RECOMPUTED = {"stages.cpt.parallel.recompute": "layer"}
WORLDS = [
    *[("nano", world, {}) for world in (1, 2, 4)],
    ("mini", 8, {}),
    *[("mini", 576 // n, {"train.accumulation": n, "stages.cpt.accumulation": n, **RECOMPUTED}) for n in (36, 18, 9)],
    *[("flash", 1024 // n, {"train.accumulation": n}) for n in (8, 4, 2)],
    ("flash", 64, {"train.accumulation": 16, "stages.mid3.accumulation": 32, "stages.mid3.parallel.context": 16}),
    *[("1t", 147456 // n, {"train.accumulation": n}) for n in (72, 144, 36)],
]


@pytest.mark.parametrize(("name", "world", "changed"), WORLDS)
def test_every_stage_of_the_recipes_fits_its_ranks(name, world, changed):
    recipe = read_recipe(RECIPES / f"{name}.toml", [(key, str(value)) for key, value in changed.items()])
    model = first_config(recipe, folder=False)[0]
    check_stages(recipe, model, world)
    for stage in recipe.stages:
        axes = check_mesh(recipe, stage, model, world)
        assert axes.world == world and stage.sequence_length % axes.context == 0


def test_what_ranks_cannot_share_is_told_with_its_setting(tmp_path):
    mini = read_recipe(RECIPES / "mini.toml")
    model = first_config(mini, folder=False)[0]
    for world, told in (
        (16, "rows of a part[\\s\\S]*stages.mid1.batch_size / accumulation[\\s\\S]*16 rows, one for each data rank"),
        (6, "cannot be cut so[\\s\\S]*where: +parallel.expert"),
        (4, "as large as the world[\\s\\S]*where: +stages.mid3.parallel.context"),
        (1, "more ranks than one[\\s\\S]*where: +parallel.expert"),
    ):
        with pytest.raises(UserError, match=told):
            check_stages(mini, model, world)
    text = SMALL.replace("steps = 5", "steps = 5\nramp = { start = 1, tokens = 64, stairs = 1 }")
    with pytest.raises(UserError, match="smaller first batch[\\s\\S]*stages.one.ramp[\\s\\S]*--stages.one.ramp.start 2"):
        check_stages(small(tmp_path, text), model, 2)
    with pytest.raises(UserError, match="fewer parts[\\s\\S]*where: +stages.two.parallel.pipeline"):
        check_stages(small(tmp_path, stages__two__parallel__pipeline="2"), model, 2)


def test_rows_too_short_for_their_ranks_are_told_before_the_first_step(tmp_path):
    recipe = small(tmp_path, stages__two__parallel__context="200", stages__one__parallel__rest="context", train__batch_size="1")
    model = first_config(recipe)[0]
    for stage, most, said in ((recipe.stages[0], 64, "more shard ranks"), (recipe.stages[1], 128, "nearest:  128")):
        with pytest.raises(UserError, match="shorter than there are ranks") as told:
            check_mesh(recipe, stage, model, 200)
        assert f"{stage.name}.parallel.context" in str(told.value) and f"at most {most}" in str(told.value)
        assert said in str(told.value)


def test_what_is_suggested_can_be_followed(tmp_path):
    """A pipeline on two ranks, of whose step data ranks cannot share the parts."""
    recipe = small(tmp_path, parallel__pipeline="2", train__accumulation="2")
    with pytest.raises(UserError, match="shared evenly") as told:
        check_stages(recipe, first_config(recipe)[0], 6)
    words = iter(str(told.value.parts["nearest"]).replace("--stages.one.", "").split())
    changed = {"train__accumulation": "2"} | {f"train__{name}": value for name, value in zip(words, words, strict=True)}
    again = small(tmp_path, parallel__pipeline="2", **changed)
    check_stages(again, first_config(again)[0], 6)


def test_the_recipe_of_the_documentation_is_one(tmp_path):
    page = (RECIPES.parent / "docs" / "training.md").read_text()
    recipe = small(tmp_path, re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[0])
    assert [s.name for s in recipe.stages] == ["short", "long"] and recipe.stages[1].merge.last == 3
    check_stages(recipe, first_config(small(tmp_path))[0])
