"""Every teacher family against transformers: same logits, and HF -> openling -> HF without a changed bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import GOLDEN, HYBRID, randomise
from transformers import AutoModelForCausalLM

import openling
from openling.model.config import LING_ARCHITECTURE
from openling.model.ling import Ling
from openling.weights.export import save
from openling.weights.names import RULES, bind

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
MOE = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES = {
    "llama": ("Llama", {}),
    "llama-biases-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e3}}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": (
        "Llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}},
    ),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-moe": ("Qwen3Moe", MOE | {"mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3-moe-unnormed": ("Qwen3Moe", MOE),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
}


def write_teacher(
    case: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB"
) -> transformers.PreTrainedModel:
    family, changes = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**BASE, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    teacher = write_teacher(case, tmp_path)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = teacher(ids).logits
    # FP32 noise is near 1e-6 here; the project's bound is 1e-4, far below the logits' own spread.
    assert expected.std() > 0.3
    torch.testing.assert_close(openling.load(tmp_path).model(ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_bit_exact(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_teacher(case, source, dtype, shard="20KB")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    loaded = openling.load(source)
    assert next(loaded.model.parameters()).dtype == dtype
    save(loaded.model, out, source=source, shard_bytes=20_000)
    assert_same_weights(source, out)
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    # Without the source's weights at hand, its config.json alone leads to the same names.
    save(loaded.model, tmp_path / "again", hf_config=loaded.hf_config)
    assert_same_weights(source, tmp_path / "again")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = ({k: v for f in p.glob("model*.safetensors") for k, v in load_file(f).items()} for p in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


@pytest.mark.parametrize("case", ["ling-2.6-tiny", "ling-2.0-tiny"])
@pytest.mark.filterwarnings("ignore:lightning_decay_offset")
def test_released_layout_round_trip(case: str, tmp_path: Path) -> None:
    save(openling.load(GOLDEN / case).model, tmp_path / "out", source=GOLDEN / case)
    assert_same_weights(GOLDEN / case, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_openling.py").exists() == (case == "ling-2.6-tiny")


def test_transformers_reads_what_we_wrote(tmp_path: Path) -> None:
    teacher = write_teacher("mixtral", tmp_path / "source")
    save(openling.load(tmp_path / "source").model, tmp_path / "out", source=tmp_path / "source", shard_bytes=30_000)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(again(ids).logits, teacher(ids).logits, atol=0, rtol=0)


@given(
    architecture=st.sampled_from(sorted(RULES)),
    kv_heads=st.sampled_from([1, 2, 4]),
    experts=st.integers(2, 5),
    head_dim=st.sampled_from([4, 12]),
)
def test_every_operation_is_invertible(architecture: str, kv_heads: int, experts: int, head_dim: int) -> None:
    config = HYBRID.replace(
        num_key_value_heads=kv_heads, num_experts=experts, head_dim=head_dim, n_group=1, topk_group=1, layer_kinds=("gqa",) * 4
    )
    width = (4 + 2 * kv_heads) * head_dim
    ours = {
        "model.word_embeddings.weight": torch.randn(96, 32),
        "model.layers.3.attention.query_key_value.weight": torch.randn(width, 32),
        "model.layers.3.attention.query_key_value.bias": torch.randn(width),
        "model.layers.3.mlp.experts.down_proj": torch.randn(experts, 32, 16),
    }
    bindings = bind(architecture, config, ours)
    theirs = {name: piece.clone() for b in bindings for name, piece in zip(b.theirs, b.split(ours[b.ours]), strict=True)}
    assert len(theirs) == sum(len(b.theirs) for b in bindings)
    for b in bindings:
        assert [theirs[name].shape for name in b.theirs] == b.piece_shapes(ours[b.ours].shape)
        back = torch.full_like(ours[b.ours], float("nan"))
        for name, target in zip(b.theirs, b.split(back), strict=True):
            target.copy_(theirs[name])
        assert torch.equal(back, ours[b.ours])


def test_names_of_the_families() -> None:
    """The names published checkpoints carry (transformers writes these for the classes it has)."""
    names = ["model.word_embeddings.weight", "model.layers.1.attention.dense.weight", "model.layers.1.mlp.experts.up_proj"]
    expected = {
        LING_ARCHITECTURE: ("model.word_embeddings.weight", "attention.dense.weight", "mlp.experts.7.up_proj.weight"),
        "Qwen3MoeForCausalLM": ("model.embed_tokens.weight", "self_attn.o_proj.weight", "mlp.experts.7.up_proj.weight"),
        "MixtralForCausalLM": ("model.embed_tokens.weight", "self_attn.o_proj.weight", "block_sparse_moe.experts.7.w3.weight"),
    }
    for architecture, (embeddings, dense, expert) in expected.items():
        found = [b.theirs[-1].removeprefix("model.layers.1.") for b in bind(architecture, HYBRID, names)]
        assert found == [embeddings, dense, expert]


def test_stored_copy_of_a_tied_head_survives(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_teacher("llama-biases-tied", source)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    model = openling.load(source).model
    assert model.lm_head.weight is model.model.word_embeddings.weight
    save(model, tmp_path / "out", source=source)
    assert_same_weights(source, tmp_path / "out")


@torch.no_grad()
def test_a_changed_teacher_is_not_written_under_its_old_config(tmp_path: Path) -> None:
    """All layers still GQA, but of another shape than the source's config.json says."""
    write_teacher("llama-biases-tied", tmp_path / "source")
    loaded = openling.load(tmp_path / "source")
    shorter = Ling(loaded.config.replace(num_hidden_layers=2, layer_kinds=("gqa",) * 2)).eval()
    shorter.load_state_dict(loaded.model.state_dict(), strict=False)
    save(shorter, tmp_path / "out", source=tmp_path / "source")
    again = openling.load(tmp_path / "out")
    assert again.hf_config["architectures"] == [LING_ARCHITECTURE]
    ids = torch.arange(20)[None]
    assert torch.equal(again.model(ids), shorter(ids))
