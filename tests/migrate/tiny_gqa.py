"""Tiny random GQA models, and small algebra, for the tests of the migration."""

import torch

from openling.migrate.calibrate import Gram
from openling.model.config import ModelConfig
from openling.model.ling import CallContext, Ling, Rope

T = 40


def config(**changes) -> ModelConfig:
    """A GQA model; MLA widths for what its layers become."""
    c = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_kinds": ("gqa", "gqa"),
        "group_norm_size": 4,
    } | changes
    rotary = int(c["head_dim"] * c.get("partial_rotary_factor", 1.0))
    widths = {"qk_nope_head_dim": c["head_dim"], "v_head_dim": c["head_dim"], "qk_rope_head_dim": rotary, "kv_lora_rank": 16}
    return ModelConfig(**widths | c)


@torch.no_grad()
def build(c: ModelConfig, seed=0, dtype=torch.float64) -> Ling:
    """Random norms and biases too."""
    g = torch.Generator().manual_seed(seed)
    model = Ling(c)
    for name, x in model.state_dict().items():
        noise = torch.randn(x.shape, generator=g)
        wide = noise if "embeddings" in name else noise * (1.5 / x.shape[-1] ** 0.5)
        x.copy_(wide if x.dim() >= 2 else 0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.to(dtype).eval()


def tokens(batch, length=T):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(batch))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def context(c: ModelConfig, tokens=T) -> CallContext:
    return CallContext(Rope(c)(torch.zeros(1, tokens, dtype=torch.long), 0, None), None, None)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def with_ones(x):
    rows = x.flatten(0, -2).double()
    return torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1)


def moment_of(x_NM):
    gram = Gram()
    gram.add(x_NM)
    return gram.moment


def energy(rows, moment):
    """E |rows x|^2."""
    return float(torch.einsum("pm,mn,pn->", rows, moment, rows))


# Changes of `config` for every family's attention.
SHAPES = {
    "llama": {},
    "qwen2": {"use_qkv_bias": True},
    "qwen3": {"gqa_qk_norm": True, "head_dim": 16},
    "biased": {"use_qkv_bias": True, "use_bias": True, "gqa_qk_norm": True},
    "ling-2.0": {"gqa_qk_norm": True, "partial_rotary_factor": 0.5},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4},
}
