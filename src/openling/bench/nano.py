"""A random hybrid of 0.7 million parameters with a byte tokenizer and a chat template: for load tests and for trying out.

It has every part of the layout (7 Lightning layers and an MLA layer with experts, an MTP layer) and writes noise.
"""

from __future__ import annotations

from pathlib import Path

import torch

from openling.data.byte_tokenizer import byte_tokenizer
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.weights.export import save

NANO = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    layer_kinds=("lightning",) * 7 + ("mla",),
    layer_group_size=8,
    group_norm_size=4,
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    partial_rotary_factor=0.5,
    moe_layers=tuple(range(1, 8)),
    num_experts=8,
    num_experts_per_tok=2,
    num_shared_experts=1,
    n_group=2,
    topk_group=1,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    moe_router_enable_expert_bias=True,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    max_position_embeddings=32768,
    initializer_range=0.1,
    pad_token_id=256,
    bos_token_id=257,
    eos_token_id=[256, 258],
)


def write_nano(folder: Path, *, seed: int = 0) -> Path:
    """Write the model to the new folder and return it. The same seed writes the same weights."""
    model = Ling(NANO)
    model.init_weights(torch.Generator().manual_seed(seed))
    save(model, folder, name="nano", provenance={"weights": f"random, seed {seed}"})
    byte_tokenizer().save_pretrained(folder)
    return folder
