"""The planned layout and the `plan` command: published figures, rules, mistakes, and that nothing heavy is imported."""

import argparse
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openling.config.presets import PRESETS
from openling.errors import UserError
from openling.migrate import plan as planner
from openling.migrate.layout import default_group_size, norm_groups, stage_kinds, target_config
from openling.model.config import ModelConfig, write_ling
from openling.model.families import read_config


def preset(name: str) -> ModelConfig:
    return read_config(PRESETS[name]())


def invoke(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    planner.add_arguments(parser)
    return planner.run(parser.parse_args(argv))


def as_json(capsys, *argv: str) -> dict:
    assert invoke(*argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------------------
# Layout
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("teacher", "hybrid"), [("ling-1t", "ling-2.6-1t"), ("ling-flash-2.0", "ling-2.6-flash")])
def test_the_default_layout_of_ling_20_is_ling_26(teacher, hybrid):
    made, published = target_config(preset(teacher)), preset(hybrid)
    names = ("layer_kinds", "layer_group_size", "group_norm_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim")
    for name in (*names, "qk_rope_head_dim", "v_head_dim", "use_qk_norm", "lightning_decay_offset", "mtp_layer_kind"):
        assert getattr(made, name) == getattr(published, name), name


def test_smollm2_layout():
    source = preset("smollm2-135m")
    made = target_config(source)
    assert [i for i, kind in enumerate(made.layer_kinds) if kind == "mla"] == [5, 11, 17, 23, 29]
    # 2 x 3 x 64 - 64 = 320 dims of its own; 60 % is 192. 2/3 of 576 is 384. 9 heads: one norm group each.
    assert (made.kv_lora_rank, made.q_lora_rank, made.qk_rope_head_dim, made.group_norm_size) == (192, 384, 64, 9)
    assert (made.use_qk_norm, made.gqa_qk_norm, made.tie_word_embeddings) == (True, False, False)
    half = stage_kinds(source, made, "lightning")
    assert set(half) == {"lightning", "gqa"}
    assert [i for i, kind in enumerate(half) if kind == "gqa"] == [5, 11, 17, 23, 29]
    assert stage_kinds(source, made, "mla") == made.layer_kinds


@pytest.mark.parametrize(
    ("layers", "group"), [(80, 8), (32, 8), (8, 8), (30, 6), (28, 7), (20, 10), (36, 9), (12, 6), (6, 6), (2, 2), (31, 31)]
)
def test_default_group_size(layers, group):
    assert default_group_size(layers) == group


@given(st.integers(2, 200))
def test_no_divisor_is_nearer_to_8(layers):
    group = default_group_size(layers)
    assert layers % group == 0
    assert all(abs(group - 8) <= abs(other - 8) for other in range(2, layers + 1) if layers % other == 0)


@pytest.mark.parametrize(("heads", "groups"), [(64, 8), (32, 4), (40, 5), (16, 16), (9, 9), (36, 36)])
def test_norm_groups(heads, groups):
    assert norm_groups(heads) == groups


def test_the_target_survives_its_own_config_json():
    made = target_config(preset("ling-1t"), group_size=16, kv_lora_rank=256)
    assert read_config(write_ling(made)) == made


@pytest.mark.parametrize(
    ("options", "value", "nearest"),
    [
        ({"group_size": 7}, 7, "6 or 10"),
        ({"group_size": 1}, 1, "2"),
        ({"group_size": 60}, 60, "30"),
        ({"kv_lora_rank": 0}, 0, None),
        ({"q_lora_rank": -1}, -1, None),
        ({"qk_rope_head_dim": 3}, 3, None),
    ],
)
def test_impossible_layouts_are_refused(options, value, nearest):
    with pytest.raises(UserError) as caught:
        target_config(preset("smollm2-135m"), **options)
    assert caught.value.parts["value"] == value
    assert caught.value.parts["nearest"] == nearest
    assert caught.value.parts["where"] in ("--group-size", f"--layout.{next(iter(options))}")


@pytest.mark.parametrize("name", ["tiny", "ring-mini-linear-2.0"])
def test_a_hybrid_is_not_migrated_again(name):
    with pytest.raises(UserError, match="already converted"):
        target_config(preset(name))


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_published_figures_at_1t(capsys):
    out = as_json(capsys, "ling-2.6-1t", "--source", "ling-1t")
    assert round(out["total_params"] / 1e9, 3) == 1012.231
    assert round(out["active_params"] / 1e9, 1) == 63.6
    assert round(out["source"]["total_params"] / 1e9, 3) == 999.705
    assert out["kv_bytes_per_token"] == 11.25 * 1024
    assert out["source"]["kv_bytes_per_token"] == 320 * 1024
    assert out["state_bytes_per_sequence"] == 280 * 2**20
    assert out["break_even_tokens"] == 929
    assert round(out["conversion_bytes_read"] / 1e9) == 24
    assert round(out["conversion_bytes_written"] / 1e9) == 49
    assert 0 < out["seconds"] < 10
    assert set(out["source"]) <= set(out)


def test_flash_has_no_source(capsys):
    out = as_json(capsys, "ling-2.6-flash")
    assert (round(out["total_params"] / 1e9, 3), round(out["total_params_with_mtp"] / 1e9, 3)) == (104.187, 107.494)
    assert round(out["active_params"] / 1e9, 2) == 7.45
    assert out["source"] is out["break_even_tokens"] is out["conversion_bytes_read"] is None


def test_a_gqa_model_is_the_source_of_its_plan(capsys):
    out = as_json(capsys, "ling-1t")
    published = as_json(capsys, "ling-2.6-1t", "--source", "ling-1t")
    assert out["source"] == published["source"]
    for key in ("total_params", "active_params", "kv_bytes_per_token", "break_even_tokens", "flops_per_token"):
        assert out[key] == published[key]


@pytest.mark.parametrize(
    ("layout", "mla", "said"),
    [("none", 0, "pure linear"), ("selected", 5, "highest scores"), ("3,7", 2, "MLA in layers 3, 7, as asked")],
)
def test_layouts_are_planned(layout, mla, said, capsys):
    """A pure linear model has no cache that grows."""
    plan = as_json(capsys, "smollm2-135m", "--layout", layout)
    assert plan["layout"]["layers"]["mla"] == mla
    assert said in plan["layout"]["why"]
    assert plan["kv_bytes_per_token"] == mla * 2 * (192 + 64)


def test_folder_file_and_preset_agree(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["smollm2-135m"]()))
    plans = [as_json(capsys, model) for model in (str(tmp_path), str(tmp_path / "config.json"), "SmolLM2-135M")]
    for one in plans:
        del one["seconds"], one["model"]
    assert plans[0] == plans[1] == plans[2]


def test_checkpoint_precision_scales_the_conversion(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["smollm2-135m"]() | {"dtype": "float32"}))
    wide, narrow = as_json(capsys, str(tmp_path)), as_json(capsys, "smollm2-135m")
    assert wide["conversion_bytes_read"] == 2 * narrow["conversion_bytes_read"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_prints_a_table(name, capsys):
    assert invoke(name) == 0
    text = capsys.readouterr().out
    assert "Cache per token" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_text_says_why_the_groups_are_so(capsys):
    invoke("smollm2-135m")
    text = " ".join(capsys.readouterr().out.split())
    assert "8 does not divide 30 layers, 6 is the nearest divisor" in text
    assert "25 Lightning + 5 MLA layers" in text


def test_gpu_memory_decides_what_fits(capsys):
    small, large = (as_json(capsys, "smollm2-135m", "--gpu-memory", size)["training_memory"] for size in ("2", "80"))
    assert (small["fits"], large["fits"], large["fits_from_gpus"]) == (False, True, 1)


@pytest.mark.parametrize(
    "argv",
    [
        ["ling-26-flash"],
        ["ling-1t", "--source", "ling-1t"],
        ["ling-2.6-1t", "--source", "ling-2.6-flash"],
        ["ling-2.6-1t", "--group-size", "8"],
        ["ling-2.6-1t", "--layout", "none"],
        ["smollm2-135m", "--group-size", "8"],
        ["smollm2-135m", "--group-size", "6", "--layout", "1,2"],
        ["smollm2-135m", "--group-size", "6", "--layout", "none"],
        ["smollm2-135m", "--tp", "2"],
        ["smollm2-135m", "--gpu-memory", "nan"],
        ["smollm2-135m", "--seq-len", "0"],
    ],
)
def test_mistakes_are_user_errors(argv):
    with pytest.raises(UserError):
        invoke(*argv)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "\x00", "{}", '{"architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}', b"\xff\xfe"]
)
def test_unreadable_configs_are_user_errors(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError):
        invoke(str(path))


def test_values_of_the_wrong_kind_are_user_errors(tmp_path):
    for key, value in [("hidden_size", "wide"), ("num_attention_heads", 0), ("num_hidden_layers", 2.5), ("rope_theta", [1])]:
        config = PRESETS["smollm2-135m"]() | {key: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError):
            invoke(str(tmp_path))


def test_an_empty_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        invoke(str(tmp_path))


def test_the_nearest_preset_is_named():
    with pytest.raises(UserError) as caught:
        invoke("ling-26-flash")
    assert caught.value.parts["nearest"] == "ling-2.6-flash"


def test_plan_is_light():
    """Neither torch nor transformers is imported, and memory stays far under the promised 1 GB."""
    code = """
import argparse, sys
from openling.migrate import plan
parser = argparse.ArgumentParser()
plan.add_arguments(parser)
plan.run(parser.parse_args(["ling-1t", "--json"]))
heavy = {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
import psutil
assert psutil.Process().memory_info().rss < 200e6
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"]["kv_bytes_per_token"] == 320 * 1024
