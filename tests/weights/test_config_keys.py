"""config.json with keys left out, null, or at odds with each other: read as transformers reads it, or refused by its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_families import write_teacher
from transformers import AutoConfig, AutoModelForCausalLM

import openling
from openling.errors import UserError
from openling.model.families import FAMILIES, read_config

ARCHITECTURES = [name for name in FAMILIES if not name.startswith("Bailing")]
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def keys(architecture: str, **changes: Any) -> dict[str, Any]:
    """The least that the architecture needs: 32 heads, which every family's own number of K/V heads divides."""
    kind = getattr(transformers, architecture).config_class.model_type
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 32}
    experts = EXPERTS if "Moe" in architecture or architecture.startswith("Mixtral") else {}
    return {"architectures": [architecture], "model_type": kind} | sizes | experts | changes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_absent_keys_mean_what_transformers_takes(architecture: str) -> None:
    given = keys(architecture, sliding_window=None)
    theirs = AutoConfig.for_model(**given)
    ours = read_config(given)
    for name in ("rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "initializer_range", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 32)
    assert ours.use_qkv_bias == getattr(theirs, "attention_bias", architecture.startswith("Qwen2"))


def odd(case: str, folder: Path, changes: dict[str, Any]) -> None:
    """A teacher whose config.json has these keys instead; ... takes one away."""
    write_teacher(case, folder)
    path = folder / "config.json"
    hf = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in hf.items() if value is not ...}))


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", {"rope_scaling": YARN}),  # beside the `rope_parameters` that transformers wrote
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}, "rope_scaling": YARN}),
        ("llama", {"rope_scaling": YARN, "rope_theta": 500.0}),
        ("llama", {"rope_parameters": ..., "rope_scaling": YARN | {"rope_theta": 100.0}, "rope_theta": 500.0}),
        ("llama", {"rope_parameters": ..., "rope_scaling": YARN, "original_max_position_embeddings": 32}),
        ("llama-llama3-rope", {"original_max_position_embeddings": 32}),
        ("llama-yarn", {"rope_parameters": YARN | {"beta_fast": 1, "beta_slow": 1}}),
        ("llama", {"rms_norm_eps": ..., "rope_parameters": ...}),
        ("mixtral", {"rms_norm_eps": ..., "rope_parameters": ...}),
        ("qwen3-moe", {"rms_norm_eps": ..., "rope_parameters": ...}),
        ("qwen2", {"sliding_window": 8}),  # switched off
        ("mistral", {"sliding_window": ...}),  # transformers takes 4096; the model has 64 positions
        ("mistral", {"max_position_embeddings": ...}),
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_where_keys_are_left_out_or_twice_there(case: str, changes: dict[str, Any], tmp_path: Path) -> None:
    odd(case, tmp_path, changes)
    ids = torch.randint(0, 96, (2, 60), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")(ids).logits
    # The rounding of FP32 logits near 1, as in test_families.
    torch.testing.assert_close(openling.load(tmp_path, dtype=torch.float32).model(ids), theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("MistralForCausalLM", {}),  # 4096 where the key is absent, of 131072 positions
        ("MistralForCausalLM", {"sliding_window": 16}),
        ("MistralForCausalLM", {"sliding_window": 16, "use_sliding_window": False}),  # no such switch there
        ("MixtralForCausalLM", {"sliding_window": 16}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True}),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 16}),
        ("Qwen3MoeForCausalLM", {"use_sliding_window": True, "sliding_window": 16}),
        ("LlamaForCausalLM", {"sliding_window": 16}),
    ],
    ids=str,
)
def test_a_window_is_refused_without_max_position_embeddings_too(architecture: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="sliding-window attention") as caught:
        read_config(keys(architecture, **changes))
    assert caught.value.parts["where"] == "sliding_window"
    if not changes:
        assert "absent" in str(caught.value)


@pytest.mark.parametrize(
    ("rope", "where"),
    [
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "rope_scaling.beta_fast"),
        ({"rope_parameters": YARN | {"beta_slow": 33}}, "rope_parameters.beta_fast"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}},
            "rope_parameters",
        ),
    ],
)
def test_rope_that_cannot_be_is_refused(rope: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(keys("LlamaForCausalLM", **rope))
    assert caught.value.parts["where"] == where


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 10**18),
        ("hidden_size", True),
        ("vocab_size", 2**70),
        ("intermediate_size", -48),
        ("intermediate_size", 2**62),
        ("num_key_value_heads", 2**40),
        ("head_dim", 2**40),
        ("attention_bias", "false"),
        ("mlp_bias", 2),
        ("tie_word_embeddings", 2),
        ("use_sliding_window", 2),
        ("sliding_window", "16"),
        ("eos_token_id", [256, "a"]),
        ("eos_token_id", {"a": 1}),
        ("bos_token_id", [1]),
        ("pad_token_id", 1.5),
        ("initializer_range", float("nan")),
        ("initializer_range", 2.0),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", 10**400),
        ("rope_parameters", []),
        ("rope_scaling", "x"),
        ("mlp_only_layers", "01"),
        ("num_local_experts", "4"),
    ],
    ids=str,
)
def test_values_that_cannot_be_name_their_key(name: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_config(keys("LlamaForCausalLM") | {name: value})
    assert caught.value.parts["where"] == name
    odd("llama", tmp_path, {name: value})
    with pytest.raises(UserError, match=name) as caught:
        openling.load(tmp_path)
    assert caught.value.parts["where"] == f"{tmp_path / 'config.json'}, {name}"
