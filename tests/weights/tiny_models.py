"""Tiny random models and folders for the weight tests."""

from __future__ import annotations

from pathlib import Path

import torch

from openling.model.config import ModelConfig
from openling.model.ling import Ling

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
HYBRID = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    layer_kinds=("lightning", "mla", "lightning", "mla"),
    layer_group_size=2,
    group_norm_size=2,
    kv_lora_rank=16,
    q_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    partial_rotary_factor=0.5,
    moe_layers=(1, 2, 3),
    num_experts=8,
    num_experts_per_tok=2,
    num_shared_experts=1,
    n_group=4,
    topk_group=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
    moe_router_enable_expert_bias=True,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    eos_token_id=95,
    pad_token_id=0,
)
# A Llama-shaped model half way: biases, no QK-norm in its softmax layers, tied embeddings, YaRN.
HALF_MIGRATED = HYBRID.replace(
    layer_kinds=("lightning", "gqa", "lightning", "gqa"),
    layer_group_size=None,
    num_key_value_heads=2,
    moe_layers=(),
    use_qkv_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    partial_rotary_factor=1.0,
    rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    num_nextn_predict_layers=0,
)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter and stored buffer random, norms near one: no tensor may be mistaken for another or for a default."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        is_norm = tensor.dim() == 1 and name.endswith("weight")
        tensor.copy_(1 + 0.1 * noise if is_norm else 0.15 * noise)


def tiny(config: ModelConfig) -> Ling:
    model = Ling(config)
    randomise(model)
    return model.eval()
