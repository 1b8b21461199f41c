"""Published models as config.json dicts with their Hugging Face keys, so that `plan` needs no checkpoint.

Values: the Ling/Ring 2.6 report (arXiv 2606.15079, table 1) and the public model code and cards of each family. Where
nothing is published, the value chosen here carries a comment. Presets are plain dicts: this package is below the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Preset = dict[str, Any]

# What Ling-2.0, linear-2.0, 2.5 and 2.6 share.
_LING: Preset = {
    "vocab_size": 157184,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_bias": False,
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
    "head_dim": 128,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "initializer_range": 0.02,
    "num_experts": 256,
    "num_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "pad_token_id": 156892,
    "eos_token_id": 156892,
    "dtype": "bfloat16",
}

# The three sizes. The flash column of Ling-2.0 is unpublished; its parameter count (102.890 B) follows from these.
_MINI: Preset = {
    "num_hidden_layers": 20,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "moe_shared_expert_intermediate_size": 512,
    "first_k_dense_replace": 1,
}
_FLASH: Preset = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 1024,
    "first_k_dense_replace": 1,
}
_1T: Preset = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "first_k_dense_replace": 4,
}

_LING_20: Preset = _LING | {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "rope_theta": 600000.0,
    "max_position_embeddings": 32768,
    # Releases say 0 or 1; the total without MTP is the same.
    "num_nextn_predict_layers": 0,
}

_HYBRID: Preset = _LING | {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "model_type": "bailing_hybrid",
    "full_attention_type": "mla",
    "layer_group_size": 8,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
    "rope_theta": 6000000.0,
    # What SGLang and vLLM compute; which offset the releases were trained with is unknown.
    "lightning_decay_offset": 0,
}

# Ring-linear-2.0 wrote its own architecture name, which current engines no longer register; the layout is that of 2.5
# with GQA as the full attention. Its theta and number of norm groups are unpublished: theta of the 2.0 base and the
# official config class's group_norm_size, 4.
_LINEAR_20: Preset = _LING | {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "model_type": "bailing_moe_linear",
    "full_attention_type": "gqa",
    "group_norm_size": 4,
    "rope_theta": 600000.0,
    "max_position_embeddings": 131072,
    "num_nextn_predict_layers": 0,
    "lightning_decay_offset": 0,
}


def ling_26_flash() -> Preset:
    """Ling-2.6-flash: 104.187 B parameters, 107.494 B with MTP, 7.45 B active."""
    heads = {"num_key_value_heads": 32, "num_kv_heads_for_linear_attn": 32}
    return _HYBRID | _FLASH | heads | {"group_norm_size": 4, "max_position_embeddings": 131072, "num_nextn_predict_layers": 1}


def ling_26_1t() -> Preset:
    """Ling-2.6-1T: 1012.231 B parameters, 63.58 B active."""
    heads = {"num_key_value_heads": 64, "num_kv_heads_for_linear_attn": 64}
    # Context: 262144 in the report's text, 131072 in some serving guides. MTP: one serving guide says it ships.
    return _HYBRID | _1T | heads | {"group_norm_size": 8, "max_position_embeddings": 262144, "num_nextn_predict_layers": 1}


def ling_25_1t() -> Preset:
    """Ling-2.5-1T and Ring-2.5-1T: the 2.6 shape; by their published size the weights hold no MTP layer."""
    return ling_26_1t() | {"max_position_embeddings": 131072, "num_nextn_predict_layers": 0}


def ring_mini_linear_20() -> Preset:
    """Ring-mini-linear-2.0: 4 Lightning layers to 1 GQA layer."""
    return _LINEAR_20 | _MINI | {"layer_group_size": 5}


def ring_flash_linear_20() -> Preset:
    """Ring-flash-linear-2.0: 7 Lightning layers to 1 GQA layer."""
    return _LINEAR_20 | _FLASH | {"layer_group_size": 8}


def ling_mini_20() -> Preset:
    """Ling-mini-2.0 and Ring-mini-2.0: 16.256 B parameters, 1.43 B active."""
    return _LING_20 | _MINI


def ling_flash_20() -> Preset:
    """Ling-flash-2.0 and Ring-flash-2.0: 102.890 B parameters, 6.15 B active."""
    return _LING_20 | _FLASH


def ling_1t() -> Preset:
    """Ling-1T and Ring-1T (2.0): 999.705 B parameters, 51.05 B active."""
    return _LING_20 | _1T


def smollm2_135m() -> Preset:
    """SmolLM2-135M: 134.515 M parameters (tied embeddings)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def tiny() -> Preset:
    """A small hybrid with every part (Lightning, MLA, experts, MTP) for tests and quick trials on a CPU."""
    return _HYBRID | {
        "vocab_size": 512,
        "num_hidden_layers": 8,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_kv_heads_for_linear_attn": 4,
        "head_dim": 16,
        "intermediate_size": 160,
        "layer_group_size": 4,
        "group_norm_size": 2,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 4096,
        "num_nextn_predict_layers": 1,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def nano() -> Preset:
    """Ours: 10 M parameters with every part of the layout, for a byte tokenizer; trains on a CPU."""
    return tiny() | {
        "vocab_size": 320,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_kv_heads_for_linear_attn": 4,
        "head_dim": 32,
        "intermediate_size": 384,
        "layer_group_size": 8,
        "group_norm_size": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_experts": 48,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 256,
    }


def ling_26_mini() -> Preset:
    """Ours: the shape of Ling-mini-2.0 with 2.6's layout; nobody has published one. 20 layers make groups of 5."""
    heads = {"num_key_value_heads": 16, "num_kv_heads_for_linear_attn": 16}
    small = {"layer_group_size": 5, "group_norm_size": 4, "max_position_embeddings": 131072, "num_nextn_predict_layers": 1}
    return _HYBRID | _MINI | heads | small


PRESETS: dict[str, Callable[[], Preset]] = {
    "ling-2.6-flash": ling_26_flash,
    "ling-2.6-1t": ling_26_1t,
    "ring-2.6-1t": ling_26_1t,
    "ling-2.5-1t": ling_25_1t,
    "ring-2.5-1t": ling_25_1t,
    "ring-mini-linear-2.0": ring_mini_linear_20,
    "ring-flash-linear-2.0": ring_flash_linear_20,
    "ling-mini-2.0": ling_mini_20,
    "ring-mini-2.0": ling_mini_20,
    "ling-flash-2.0": ling_flash_20,
    "ring-flash-2.0": ling_flash_20,
    "ling-1t": ling_1t,
    "ring-1t": ling_1t,
    "smollm2-135m": smollm2_135m,
    "tiny": tiny,
    "nano": nano,
    "ling-2.6-mini": ling_26_mini,
}
