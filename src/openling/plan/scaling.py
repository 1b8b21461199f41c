"""The published Ling scaling laws (arXiv 2507.17702): learning rate, batch, model and tokens for a budget of training FLOPs.

    lr = 1.1576 C^-0.1529      batch = 0.0694 C^0.3644 tokens      C = M D     M FLOPs per token, D tokens
    experts  M = 0.1915 C^0.5095    D = 5.2232 C^0.4905
    dense    M = 0.0655 C^0.5422    D = 15.2582 C^0.4578

Efficiency leverage EL: how many times the FLOPs a dense model would need for the loss of one with experts, with activation
ratio A and granularity G = 2 hidden_size / moe_intermediate_size (natural log for G, log10 for C: the published checks fix both):

    EL = Ah^(alpha + gamma ln(G)^2 + beta ln(G))    alpha = a + d log10(C)    1/Ah = 1/(A + 1/(1/A_start - 1/A_max)) + 1/A_max

The laws were fitted on GQA models; the refit on the hybrid that Ling-2.6 used is not published. No torch here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

from openling.config.presets import PRESETS
from openling.errors import UserError
from openling.model import count
from openling.model.config import LayerKind, ModelConfig
from openling.model.families import read_config

Kind = Literal["moe", "dense"]
SEQUENCE = 4096
# Largest budgets at which published numbers confirm the laws: Ling-mini-beta against a dense model (0.85 B active x 1 T tokens),
# and the learning rate and batch of Ling-1T (51 B active x 20 T tokens). The range of the fits themselves is not known to us.
CONFIRMED_SHAPE = 6 * 0.85e9 * 1e12
CONFIRMED_RATE = 6 * 51e9 * 20e12
SMALLEST, LARGEST = 1e15, 1e28

_A, _D, _GAMMA, _BETA = 1.23, -7.61e-2, 1.67e-2, -1.17e-1
_A_START, _A_MAX = 1.63e-2, 5.28e16


def learning_rate(flops: float) -> float:
    """Peak learning rate (AdamW) for a budget."""
    return 1.1576 * flops**-0.1529


def batch_tokens(flops: float) -> float:
    """Tokens per optimiser step for a budget."""
    return 0.0694 * flops**0.3644


def model_flops(flops: float, kind: Kind = "moe") -> float:
    """M: training FLOPs per token, forward and backward, of the model that a budget is best spent on."""
    return 0.1915 * flops**0.5095 if kind == "moe" else 0.0655 * flops**0.5422


def tokens(flops: float, kind: Kind = "moe") -> float:
    """D: tokens to train that model on."""
    return 5.2232 * flops**0.4905 if kind == "moe" else 15.2582 * flops**0.4578


def leverage(activation: float, granularity: float, flops: float) -> float:
    """EL; activation is active over all routed experts (8 of 256 is 1/32)."""
    bent = activation + 1 / (1 / _A_START - 1 / _A_MAX)
    scaled = 1 / (1 / bent + 1 / _A_MAX)
    log = math.log(granularity)
    return float(scaled ** (_A + _D * math.log10(flops) + _GAMMA * log**2 + _BETA * log))


@dataclass(frozen=True)
class Shape:
    """A model of the Ling-2.6 family near a wanted M; its proportions are ours (see `shape_for`)."""

    config: ModelConfig
    flops_per_token: float
    total_parameters: int
    active_parameters: int


@dataclass(frozen=True)
class Budget:
    """What the laws say about a budget; `extrapolated` names each statement that goes beyond its published confirmation."""

    flops: float
    kind: Kind
    learning_rate: float
    batch_tokens: float
    flops_per_token: float
    tokens: float
    steps: float
    leverage: float | None
    shape: Shape
    extrapolated: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; of the shape what defines it."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "layer_group_size", "intermediate_size")
        experts = ("num_experts", "num_experts_per_tok", "num_shared_experts", "moe_intermediate_size")
        c = self.shape.config
        shape = {name: getattr(c, name) for name in names + experts} | {"dense_layers": c.num_hidden_layers - len(c.moe_layers)}
        numbers = {f"shape_{k}": v for k, v in asdict(self.shape).items() if k != "config"}
        return {**{k: v for k, v in asdict(self).items() if k != "shape"}, **numbers, "shape": shape}


def plan_budget(flops: float, kind: Kind = "moe") -> Budget:
    """Everything the laws say about `flops` (C = 6 x active parameters x tokens, roughly); UserError outside 1e15..1e28."""
    if not SMALLEST <= flops <= LARGEST:
        raise UserError(
            "the scaling laws say nothing about this budget", where="--budget", value=f"{flops:g}", expected="1e15 to 1e28 FLOPs"
        )
    shape = shape_for(model_flops(flops, kind), kind)
    c = shape.config
    granular = 2 * c.hidden_size / c.moe_intermediate_size if kind == "moe" else 0.0
    gain = leverage(c.num_experts_per_tok / c.num_experts, granular, flops) if kind == "moe" else None
    rate, batch, D = learning_rate(flops), batch_tokens(flops), tokens(flops, kind)
    return Budget(flops, kind, rate, batch, model_flops(flops, kind), D, D / batch, gain, shape, _extrapolated(flops))


def _extrapolated(flops: float) -> list[str]:
    said = ["everything, to hybrids: the laws were fitted on GQA models, and the refit for Ling-2.6 is not published"]
    if flops > CONFIRMED_SHAPE:
        said.append(f"model, tokens and leverage: no published run confirms them beyond {CONFIRMED_SHAPE:.1e} FLOPs")
    if flops > CONFIRMED_RATE:
        said.append(f"learning rate and batch: beyond Ling-1T's {CONFIRMED_RATE:.2e} FLOPs")
    return said


def training_flops(c: ModelConfig, context: int = SEQUENCE) -> float:
    """M of a model: 3 x the forward FLOPs of a sequence's average token, without LM head (the paper's M has no embeddings)."""
    forward = count.forward_flops(c, context // 2).total
    return 3.0 * (forward - 2 * c.vocab_size * c.hidden_size)


def shape_for(wanted: float, kind: Kind = "moe") -> Shape:
    """The Ling-2.6 shaped model whose M is nearest to `wanted`.

    Proportions of flash and 1T, which are all that is published: groups of 8 layers, heads of 128, about 102 to 128 hidden dims
    per layer, 256 experts of hidden / 4 of which 8 are active (G = 8), one shared. Small models get smaller heads and groups.
    """
    best = min(_family(kind), key=lambda c: abs(math.log(training_flops(c) / wanted)))
    return Shape(best, training_flops(best), count.total_parameters(best), count.active_parameters(best))


@cache
def _family(kind: Kind) -> list[ModelConfig]:
    """Every shape that is considered."""
    base = read_config(PRESETS["ling-2.6-flash"]())
    found = []
    for layers in (*range(4, 16, 4), *range(16, 129, 8)):
        group = 8 if layers % 8 == 0 else 4
        # Heads in fours, so that tensor parallelism has something to split.
        for width in (*range(256, 1024, 256), *range(1024, 24577, 512)):
            if not 88 <= width / layers <= 140 and not (layers == 4 and width < 512):
                continue
            dim = 128 if width >= 1024 else 64
            heads = width // dim
            dense = max(1, round(layers / 20)) if layers > 40 else 1
            kinds: tuple[LayerKind, ...] = tuple("mla" if (i + 1) % group == 0 else "lightning" for i in range(layers))
            changes: dict[str, Any] = {
                "hidden_size": width, "num_hidden_layers": layers, "layer_kinds": kinds, "layer_group_size": group,
                "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": dim, "qk_nope_head_dim": dim,
                "v_head_dim": dim, "qk_rope_head_dim": dim // 2, "group_norm_size": 8 if heads % 8 == 0 else 4,
                "kv_lora_rank": min(512, width), "q_lora_rank": min(1536, width), "num_nextn_predict_layers": 0,
                "intermediate_size": round(2.25 * width / 64) * 64,
            }  # fmt: skip
            expert = max(32, width // 4)
            if kind == "moe":
                changes |= {"moe_layers": tuple(range(dense, layers)), "moe_intermediate_size": expert}
                changes["moe_shared_expert_intermediate_size"] = expert
            else:
                changes |= {"moe_layers": (), "num_experts": 0, "num_experts_per_tok": 0, "num_shared_experts": 0}
                changes |= {"moe_intermediate_size": 0, "moe_shared_expert_intermediate_size": 0}
            found.append(base.replace(**changes))
    return found
