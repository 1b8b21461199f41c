"""What SGLang and vLLM read of an exported folder, key by key, and the command that serves it (docs/serving.md has the table)."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import HALF_MIGRATED, HYBRID, tiny

from openling.errors import UserError
from openling.model.config import ModelConfig, write_ling
from openling.weights.cluster import (
    ENGINES,
    Checkpoint,
    EngineName,
    Launch,
    check_engine,
    command,
    default_tensor_parallel,
    describe,
    launch_script,
    read_checkpoint,
    valid_tensor_parallel,
)
from openling.weights.export import save

DENSE = HYBRID.replace(moe_layers=(), num_nextn_predict_layers=0)
# What each engine reads where the file says nothing is not what the checkpoint means, or an error.
READ_BY_BOTH = {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "model_type": "bailing_hybrid",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "linear_rope": True,
    "use_linear_silu": False,
    "linear_silu": False,
    "group_norm_size": 2,
    "layer_group_size": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "num_experts": 8,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "num_nextn_predict_layers": 1,
}
READ_BY_SGLANG = {
    "rotary_dim": 4,
    "full_attention_type": "mla",
    "linear_backend": "seg_la",
    "mamba_ssm_dtype": "float32",
    "lightning_layerwise_decay": True,
    "num_kv_heads_for_linear_attn": 4,
    "moe_layer_freq": 1,
}
READ_BY_VLLM = {"moe_shared_expert_intermediate_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny(HYBRID), tmp_path_factory.mktemp("export") / "hybrid")


@pytest.mark.parametrize("key", READ_BY_BOTH | READ_BY_SGLANG | READ_BY_VLLM)
def test_key_is_written(folder: Path, key: str) -> None:
    found = json.loads((folder / "config.json").read_text())
    expected = (READ_BY_BOTH | READ_BY_SGLANG | READ_BY_VLLM)[key]
    assert key in found
    assert found[key] == expected
    assert isinstance(found[key], type(expected))


def test_remote_code_is_named_and_there(folder: Path) -> None:
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModelForCausalLM"}
    for target in auto_map.values():
        module, name = target.split(".")
        assert f"class {name}(" in (folder / f"{module}.py").read_text()


def test_no_key_of_the_kda_family_is_written(folder: Path) -> None:
    """A `short_conv_kernel_size` would make SGLang take the model for Ling-3.0."""
    assert "short_conv_kernel_size" not in json.loads((folder / "config.json").read_text())


def test_norm_topk_prob_is_the_models_own() -> None:
    assert write_ling(HYBRID.replace(norm_topk_prob=False))["norm_topk_prob"] is False


def test_dense_hybrids_are_dense_for_engines() -> None:
    """Both make layers from first_k_dense_replace on sparse."""
    config = write_ling(DENSE)
    assert config["first_k_dense_replace"] == config["num_hidden_layers"]
    assert "moe_layers" not in config


def checkpoint(config: ModelConfig, template: str = "", mtp: bool = True, size: int = 1 << 20) -> Checkpoint:
    hf = json.loads(json.dumps(write_ling(config.replace(tie_word_embeddings=False))))
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return describe(hf, template, [f"model.layers.{i}.input_layernorm.weight" for i in range(layers)], size)


def words(engine: EngineName, found: Checkpoint, **chosen: object) -> str:
    return shlex.join(command(engine, found, "MODEL", Launch(**{"tp": 1} | chosen)))


def test_state_is_float32_in_both() -> None:
    assert "--mamba-ssm-dtype float32" in words("sglang", checkpoint(HYBRID))
    assert "--mamba-cache-dtype float32" in words("vllm", checkpoint(HYBRID))


@pytest.mark.parametrize("engine", ENGINES)
def test_local_and_explicit_address(engine: EngineName) -> None:
    assert "--host 127.0.0.1 --port 8000" in words(engine, checkpoint(HYBRID))
    assert "--host 10.0.0.1 --port 9" in words(engine, checkpoint(HYBRID), host="10.0.0.1", port=9)


def test_mtp_flags_where_the_engine_can_draft() -> None:
    sglang = "--speculative-algorithm NEXTN --speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
    vllm = '{"method": "mtp", "num_speculative_tokens": 3}'
    assert sglang in words("sglang", checkpoint(HYBRID))
    assert vllm in words("vllm", checkpoint(HYBRID))
    without = [checkpoint(HYBRID, mtp=False), checkpoint(HYBRID.replace(num_nextn_predict_layers=0))]
    without += [checkpoint(HYBRID.replace(mtp_layer_kind="gqa")), checkpoint(HYBRID.replace(num_nextn_predict_layers=2))]
    without += [checkpoint(DENSE.replace(num_nextn_predict_layers=1))]  # engines build a sparse MTP layer whatever the rest is
    for found in without:
        assert "speculative" not in words("sglang", found) + words("vllm", found)


@pytest.mark.parametrize(("version", "flag"), [("", "radix-cache"), ("0.5.23", "radix-cache"), ("0.5.10", "scheduler")])
def test_flag_names_follow_the_version(version: str, flag: str) -> None:
    assert f"--mamba-{flag}-strategy extra_buffer" in words("sglang", checkpoint(HYBRID), version=version)


LING = "{{ '<tool_call>' }}"
RING = "{{ reasoning_effort }} <tool_call><arg_key>"


@pytest.mark.parametrize(
    ("template", "sglang", "vllm"),
    [
        (LING, ["--tool-call-parser qwen25"], ["--enable-auto-tool-choice --tool-call-parser hermes"]),
        (RING, ["--tool-call-parser glm", "--reasoning-parser deepseek-r1"], ["--tool-call-parser glm45", "deepseek_r1"]),
        ("", [], []),
    ],
)
def test_parsers_follow_the_chat_template(template: str, sglang: list[str], vllm: list[str]) -> None:
    found = {"sglang": words("sglang", checkpoint(HYBRID, template)), "vllm": words("vllm", checkpoint(HYBRID, template))}
    for engine, expected in (("sglang", sglang), ("vllm", vllm)):
        assert all(part in found[engine] for part in expected)
        assert ("--tool-call-parser" in found[engine]) == bool(expected)
        assert ("--reasoning-parser" in found[engine]) == (template == RING)


def override(engine: EngineName, found: Checkpoint, length: int) -> dict[str, object] | None:
    line = command(engine, found, "MODEL", Launch(tp=1, max_model_len=length))
    flag = {"sglang": "--json-model-override-args", "vllm": "--hf-overrides"}[engine]
    return json.loads(line[line.index(flag) + 1]) if flag in line else None


@pytest.mark.parametrize("engine", ENGINES)
def test_yarn_beyond_the_models_own_context(engine: EngineName) -> None:
    found = checkpoint(HYBRID)
    assert override(engine, found, 4096) is None
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
    assert override(engine, found, 8192) == {"rope_scaling": scaling, "max_position_embeddings": 8192}
    scaled = checkpoint(HYBRID.replace(rope_scaling=scaling | {"beta_fast": 32}, max_position_embeddings=8192))
    expected = scaling | {"factor": 4.0, "beta_fast": 32}  # over the original length, not over the extended one
    assert override(engine, scaled, 16384) == {"rope_scaling": expected, "max_position_embeddings": 16384}


def test_tensor_parallel_that_does_not_fit_is_refused_with_the_nearest() -> None:
    eight = HYBRID.replace(num_attention_heads=8, num_key_value_heads=8, group_norm_size=8, hidden_size=64)
    assert valid_tensor_parallel(checkpoint(eight)) == [1, 2, 4, 8]
    flash = HYBRID.replace(num_attention_heads=8, num_key_value_heads=8, group_norm_size=4, hidden_size=64)
    assert valid_tensor_parallel(checkpoint(flash)) == [1, 2, 4]
    with pytest.raises(UserError) as error:
        command("sglang", checkpoint(flash), "MODEL", Launch(tp=8))
    assert error.value.parts["nearest"] == 4
    with pytest.raises(UserError) as error:
        command("vllm", checkpoint(flash), "MODEL", Launch(tp=3))
    assert error.value.parts["nearest"] == 4
    with pytest.raises(UserError, match="cannot be split"):
        command("vllm", checkpoint(flash), "MODEL", Launch(tp=0))
    # The group norm alone is not enough: the heads, and equal parts of the MLPs.
    assert valid_tensor_parallel(checkpoint(flash.replace(intermediate_size=50))) == [1, 2]


def test_default_split_leaves_room_on_a_card() -> None:
    flash = HYBRID.replace(num_attention_heads=8, num_key_value_heads=8, group_norm_size=4, hidden_size=64)
    assert [default_tensor_parallel(checkpoint(flash, size=gib << 30)) for gib in (1, 56, 57, 112, 200, 4000)] == [
        1,
        1,
        2,
        2,
        4,
        4,
    ]


REFUSED = [
    (HALF_MIGRATED.replace(use_qkv_bias=False, mlp_bias=False), "layer_kinds", ENGINES),
    (DENSE.replace(layer_kinds=("mla", "lightning", "mla", "lightning")), "layer_kinds", ENGINES),
    (DENSE.replace(layer_group_size=None), "layer_kinds", ENGINES),
    (DENSE.replace(use_qkv_bias=True), "use_qkv_bias", ENGINES),
    (DENSE.replace(mlp_bias=True), "mlp_bias", ENGINES),
    (HYBRID.replace(lightning_decay_offset=1), "lightning_decay_offset", ENGINES),
    (HYBRID.replace(moe_layers=(1, 3)), "moe_layers", ENGINES),
    (HYBRID.replace(moe_router_enable_expert_bias=False), "score_function", ENGINES),
    (HYBRID.replace(moe_shared_expert_intermediate_size=24), "moe_shared_expert_intermediate_size", ("sglang",)),
    (DENSE.replace(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_type", ("sglang",)),
    (DENSE.replace(head_dim=12, qk_nope_head_dim=12), "head_dim", ("vllm",)),
]


@pytest.mark.parametrize(("config", "key", "engines"), REFUSED)
def test_models_an_engine_would_misread_are_refused(
    config: ModelConfig, key: str, engines: tuple[EngineName, ...], tmp_path: Path
) -> None:
    found = checkpoint(config)
    for engine in ENGINES:
        if engine in engines:
            with pytest.raises(UserError, match="cannot serve this model") as error:
                check_engine(found, engine)
            assert key in str(error.value.parts["where"])
        else:
            check_engine(found, engine)
        script = tmp_path / engine
        script.write_text(launch_script(engine, found))
        if engine in engines:
            run = subprocess.run(["sh", script], capture_output=True, text=True)
            assert (run.returncode, "cannot serve" in run.stderr) == (2, True)


def test_scripts_run_what_the_command_says(folder: Path, tmp_path: Path) -> None:
    """The engines are stood in for by programs that print their arguments."""
    for engine, program in (("sglang", "python"), ("vllm", "vllm")):
        fake = tmp_path / program
        fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
        fake.chmod(0o755)
        script = folder / f"launch_{engine}.sh"
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        run = subprocess.run(["sh", script, "--port", "9", "--extra"], capture_output=True, text=True, env=env, check=True)
        expected = command(engine, read_checkpoint(folder), str(folder), Launch(tp=1))
        assert run.stdout.split("\n")[:-1] == [*expected[1:], "--port", "9", "--extra"]


def test_a_gqa_folder_gets_no_hybrid_flags(tmp_path: Path) -> None:
    found = replace(checkpoint(HYBRID), hf={"architectures": ["LlamaForCausalLM"]})
    assert not re.search("mamba|remote|speculative", words("sglang", found) + words("vllm", found))
