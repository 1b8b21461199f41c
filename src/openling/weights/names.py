"""Names: checkpoint tensors of every family <-> openling's parameters, as short tables of invertible rules.

openling's names are those of the released Ling checkpoints; only routed experts differ, which are stacked here. A rule
maps one of our names to its pieces in a checkpoint: one piece is a rename, several are concatenated along the rows, and a
piece with `{e}` is one expert of a stack. Every operation has an exact inverse. What no rule mentions keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openling.model.config import LING_ARCHITECTURE, ModelConfig


@dataclass(frozen=True)
class Rule:
    """`{i}` stands for a layer, `{p}` for weight or bias, `{e}` for an expert."""

    ours: str
    theirs: tuple[str, ...]

    def match(self, name: str) -> list[str] | None:
        """The piece templates for one of our names (only `{e}` left open), or None."""
        pattern = re.escape(self.ours).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", "(?P<p>weight|bias)")
        found = re.fullmatch(pattern, name)
        if found is None:
            return None
        values = found.groupdict()
        return [t.replace("{i}", values.get("i") or "").replace("{p}", values.get("p") or "") for t in self.theirs]


def _layer(ours: str, *theirs: str) -> Rule:
    return Rule(f"model.layers.{{i}}.{ours}", tuple(f"model.layers.{{i}}.{t}" for t in theirs))


def _experts(folder: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    pairs = (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
    return tuple(_layer(f"mlp.experts.{ours}", f"{folder}.experts.{{e}}.{theirs}.weight") for ours, theirs in pairs)


_LING = _experts("mlp", "gate_proj", "up_proj", "down_proj")
_LLAMA = (
    Rule("model.word_embeddings.weight", ("model.embed_tokens.weight",)),
    _layer("attention.query_key_value.{p}", "self_attn.q_proj.{p}", "self_attn.k_proj.{p}", "self_attn.v_proj.{p}"),
    _layer("attention.dense.{p}", "self_attn.o_proj.{p}"),
    _layer("attention.query_layernorm.weight", "self_attn.q_norm.weight"),
    _layer("attention.key_layernorm.weight", "self_attn.k_norm.weight"),
)
_MIXTRAL = (_layer("mlp.gate.weight", "block_sparse_moe.gate.weight"), *_experts("block_sparse_moe", "w1", "w3", "w2"))

RULES: dict[str, tuple[Rule, ...]] = {
    LING_ARCHITECTURE: _LING,
    "BailingMoeV2ForCausalLM": _LING,
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": _LLAMA + _LING,
    "MixtralForCausalLM": _LLAMA + _MIXTRAL,
}

# Other spellings met in checkpoints of the same model (the router's bias in DeepSeek's words).
ALIASES = {"mlp.gate.expert_bias": "mlp.gate.e_score_correction_bias"}
# Stored by old versions of the official code, recomputed by everyone.
RECOMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|slopes?)$")


@dataclass(frozen=True)
class Binding:
    """One of our tensors and its pieces in a checkpoint, in order."""

    ours: str
    theirs: tuple[str, ...]
    op: Literal["same", "rows", "stack"] = "same"
    rows: tuple[int, ...] = ()

    def piece_shapes(self, shape: torch.Size) -> list[torch.Size]:
        """Shapes of the pieces of a tensor of this shape."""
        if self.op == "rows":
            return [torch.Size((n, *shape[1:])) for n in self.rows]
        return [shape[1:] if self.op == "stack" else shape] * len(self.theirs)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Views of our tensor, one for each piece. Writing to them is the inverse of reading them."""
        if self.op == "rows":
            return list(tensor.split(self.rows))
        return list(tensor.unbind()) if self.op == "stack" else [tensor]


def bind(architecture: str, config: ModelConfig, ours: Iterable[str], *, present: Container[str] | None = None) -> list[Binding]:
    """Bindings of all our tensor names under a family's rules.

    present: the names of an existing checkpoint, which settle what the family leaves open: aliases, and whether a tied
    LM head is stored. Without them a tied head is left out.
    """
    bindings = (_bind_one(RULES[architecture], config, name, present) for name in ours)
    return [b for b in bindings if not (b.ours == "lm_head.weight" and config.tie_word_embeddings and not _has(present, b))]


def _has(present: Container[str] | None, binding: Binding) -> bool:
    return present is not None and binding.theirs[0] in present


def _bind_one(rules: tuple[Rule, ...], config: ModelConfig, name: str, present: Container[str] | None) -> Binding:
    pieces = next((found for rule in rules if (found := rule.match(name)) is not None), [name])
    if "{e}" in pieces[0]:
        return Binding(name, tuple(pieces[0].replace("{e}", str(e)) for e in range(config.num_experts)), "stack")
    if len(pieces) > 1:
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return Binding(name, tuple(pieces), "rows", (heads, kv_heads, kv_heads))
    for usual, other in ALIASES.items():
        if name.endswith(usual) and present is not None and name not in present:
            alias = name.removesuffix(usual) + other
            pieces = [alias] if alias in present else pieces
    return Binding(name, tuple(pieces))
