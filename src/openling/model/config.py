"""The model's configuration, and its form in a Ling-2.5/2.6 `config.json` (`BailingMoeV2_5ForCausalLM`).

`ModelConfig` uses the checkpoint's own key names. What differs from the stock files: `layer_kinds` states the mixer of
every layer, so that a half-migrated model is an ordinary checkpoint. No torch here: `plan` runs from a config alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from openling.errors import UserError

LayerKind = Literal["gqa", "lightning", "mla"]
LAYER_KINDS: tuple[LayerKind, ...] = ("gqa", "lightning", "mla")
LING_ARCHITECTURE = "BailingMoeV2_5ForCausalLM"
LING_MODEL_TYPE = "bailing_hybrid"


@dataclass(frozen=True)
class ModelConfig:
    """Everything the model file needs. Widths are in values, ranks and head dims too; nothing here is in bytes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_kinds: tuple[LayerKind, ...]
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    # Biases: q, k, v (and MLA's down-projections); the output projection; the MLP.
    use_qkv_bias: bool = False
    use_bias: bool = False
    mlp_bias: bool = False
    # Positions. `partial_rotary_factor` is for GQA and Lightning; MLA rotates all of qk_rope_head_dim.
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int = 4096
    # QK-norm of Lightning layers and of GQA layers (a Llama-shaped teacher has none, its Lightning layers do).
    use_qk_norm: bool = True
    gqa_qk_norm: bool = False
    # Lightning. `group_norm_size` is the number of groups of the output norm.
    group_norm_size: int = 1
    lightning_decay_offset: int = 0
    linear_silu: bool = False
    layer_group_size: int | None = None
    # MLA.
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    # Experts: layers listed in `moe_layers` are sparse, the others dense.
    moe_layers: tuple[int, ...] = ()
    num_experts: int = 0
    num_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    moe_router_enable_expert_bias: bool = False
    # Multi-token prediction: layers L .. L + num_nextn_predict_layers - 1 of the checkpoint.
    num_nextn_predict_layers: int = 0
    mtp_layer_kind: LayerKind = "mla"
    mtp_loss_scaling_factor: float = 0.0

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise UserError("the model configuration contradicts itself", **problem)

    @property
    def rotary_dim(self) -> int:
        """Rotated dims of each GQA and Lightning head."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def qk_head_dim(self) -> int:
        """Width of an MLA query or key: nope and rope parts."""
        return (self.qk_nope_head_dim or 0) + (self.qk_rope_head_dim or 0)

    def layer_kind(self, layer: int) -> LayerKind:
        """Mixer of a layer; MTP layers follow the hidden layers."""
        return self.layer_kinds[layer] if layer < self.num_hidden_layers else self.mtp_layer_kind

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is sparse; MTP layers are whenever the last hidden layer is."""
        return min(layer, self.num_hidden_layers - 1) in self.moe_layers

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def _problems(c: ModelConfig) -> list[dict[str, Any]]:
    """Contradictions, each as the parts of an error message."""
    found: list[dict[str, Any]] = []

    def check(ok: bool, where: str, value: object, expected: object) -> None:
        if not ok:
            found.append({"where": where, "value": value, "expected": expected})

    positive = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    for name in positive:
        check(getattr(c, name) > 0, name, getattr(c, name), "a positive integer")
    check(
        0 < c.max_position_embeddings < 2**40, "max_position_embeddings", c.max_position_embeddings, "a positive number of tokens"
    )
    check(0 <= c.rms_norm_eps < 1, "rms_norm_eps", c.rms_norm_eps, "a small number, not negative")
    check(1 < c.rope_theta < float("inf"), "rope_theta", c.rope_theta, "a finite number above 1")
    if found:
        return found
    kinds, heads = c.layer_kinds, c.num_attention_heads
    check(len(kinds) == c.num_hidden_layers, "layer_kinds", f"{len(kinds)} entries", f"num_hidden_layers = {c.num_hidden_layers}")
    check(set(kinds) <= set(LAYER_KINDS), "layer_kinds", sorted(set(kinds)), f"only {', '.join(LAYER_KINDS)}")
    check(heads % c.num_key_value_heads == 0, "num_key_value_heads", c.num_key_value_heads, f"a divisor of {heads} heads")
    ok = c.rotary_dim % 2 == 0 and 0 <= c.rotary_dim <= c.head_dim
    check(ok, "partial_rotary_factor", c.partial_rotary_factor, f"an even number of the {c.head_dim} dims")
    check(c.mtp_layer_kind in ("gqa", "mla"), "mtp_layer_kind", c.mtp_layer_kind, "gqa or mla")
    if "lightning" in kinds:
        width = heads * c.head_dim
        ok = c.group_norm_size > 0 and width % c.group_norm_size == 0
        check(ok, "group_norm_size", c.group_norm_size, f"a divisor of {width} = heads x head_dim")
    if "mla" in kinds or (c.num_nextn_predict_layers and c.mtp_layer_kind == "mla"):
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            check((getattr(c, name) or 0) > 0, name, getattr(c, name), "a positive integer, since there are MLA layers")
        check((c.qk_rope_head_dim or 0) % 2 == 0, "qk_rope_head_dim", c.qk_rope_head_dim, "an even number")
    if c.moe_layers:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            check(getattr(c, name) > 0, name, getattr(c, name), "a positive integer, since there are expert layers")
        # A group is scored by its two best experts.
        ok = c.n_group == 1 or (c.n_group > 1 and c.num_experts % c.n_group == 0 and c.num_experts >= 2 * c.n_group)
        check(ok, "n_group", c.n_group, f"groups of equal size, 2 or more of the {c.num_experts} experts in each")
        check(1 <= c.topk_group <= c.n_group, "topk_group", c.topk_group, f"between 1 and n_group = {c.n_group}")
        most = c.num_experts // max(c.n_group, 1) * c.topk_group
        check(c.num_experts_per_tok <= most, "num_experts_per_tok", c.num_experts_per_tok, f"at most {most}")
        check(max(c.moe_layers) < c.num_hidden_layers, "moe_layers", max(c.moe_layers), f"layers below {c.num_hidden_layers}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Reading: rope in either spelling, then the Ling families
# ---------------------------------------------------------------------------------------------------------------------


def need(hf: dict[str, Any], key: str) -> Any:
    """A required key of config.json."""
    if hf.get(key) is None:
        raise UserError("config.json lacks a key the model needs", where=key, expected="a value", value=hf.get(key))
    return hf[key]


def read_rope(hf: dict[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_scaling and partial_rotary_factor from `rope_parameters` (transformers 5) or the older keys."""
    rope: dict[str, Any] = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    theta, factor = (
        next((value for value in (rope.pop(key, None), hf.get(key)) if value is not None), default)
        for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0))
    )
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        raise UserError(
            "this RoPE scaling is not supported",
            where="rope_scaling.rope_type",
            value=rope["rope_type"],
            expected="default, linear, llama3 or yarn",
        )
    _check_scaling(rope)
    scaling = None if rope["rope_type"] == "default" else rope
    return {"rope_theta": float(theta), "rope_scaling": scaling, "partial_rotary_factor": float(factor)}


def _check_scaling(rope: dict[str, Any]) -> None:
    """A `UserError` where a key that the scaling's formula needs is absent or no number above 0."""
    needed = {
        "default": (),
        "linear": ("factor",),
        "yarn": ("factor", "original_max_position_embeddings"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[rope["rope_type"]]
    given = tuple(key for key in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim") if rope.get(key))
    for key in (*needed, *given):
        value = rope.get(key)
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UserError("this RoPE scaling cannot be", where=f"rope_scaling.{key}", value=value, expected="a number above 0")


def read_tokens(hf: dict[str, Any]) -> dict[str, Any]:
    """Special token ids."""
    return {key: hf.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _ling_layer_kinds(hf: dict[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Explicit `layer_kinds`, or the published rule: full attention last in each group and in an unfilled last group."""
    if hf.get("layer_kinds"):
        return tuple(hf["layer_kinds"])
    group = need(hf, "layer_group_size")
    full: LayerKind = "mla" if hf.get("full_attention_type", "mla") == "mla" else "gqa"
    whole = layers // group * group
    return tuple(full if (i + 1) % group == 0 or i >= whole else "lightning" for i in range(layers))


def ling_moe_fields(hf: dict[str, Any], layers: int) -> dict[str, Any]:
    """The expert keys shared by Ling-2.0, 2.5 and 2.6."""
    experts = hf.get("num_experts") or 0
    first = hf.get("first_k_dense_replace") or 0
    moe_layers = tuple(hf["moe_layers"]) if "moe_layers" in hf else tuple(range(first, layers))
    if not experts:
        return {}
    shared = hf.get("num_shared_experts") or 0
    width = need(hf, "moe_intermediate_size")
    return {
        "moe_layers": moe_layers,
        "num_experts": experts,
        "num_shared_experts": shared,
        "num_experts_per_tok": need(hf, "num_experts_per_tok"),
        "moe_intermediate_size": width,
        "moe_shared_expert_intermediate_size": (hf.get("moe_shared_expert_intermediate_size") or width) * shared,
        "n_group": hf.get("n_group") or 1,
        "topk_group": hf.get("topk_group") or 1,
        "routed_scaling_factor": float(hf.get("routed_scaling_factor") or 1.0),
        "score_function": hf.get("score_function") or hf.get("scoring_func") or "sigmoid",
        # The official code always renormalises; engines that default to false misread a config without the key.
        "norm_topk_prob": hf.get("norm_topk_prob", True),
        "moe_router_enable_expert_bias": hf.get("moe_router_enable_expert_bias", True),
    }


def read_ling(hf: dict[str, Any]) -> ModelConfig:
    """`config.json` of Ling/Ring 2.5 and 2.6 (`bailing_hybrid`), or of anything openling wrote."""
    layers, hidden, heads = (need(hf, k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    kinds = _ling_layer_kinds(hf, layers)
    qk_norm = bool(hf.get("use_qk_norm", True))
    return ModelConfig(
        vocab_size=need(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=hf.get("intermediate_size") or 0,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=hf.get("num_key_value_heads", heads),
        head_dim=hf.get("head_dim") or hidden // heads,
        layer_kinds=kinds,
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        initializer_range=hf.get("initializer_range", 0.02),
        use_qkv_bias=bool(hf.get("use_qkv_bias", False)),
        use_bias=bool(hf.get("use_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
        max_position_embeddings=hf.get("max_position_embeddings") or 4096,
        use_qk_norm=qk_norm,
        gqa_qk_norm=bool(hf.get("gqa_qk_norm", qk_norm)),
        group_norm_size=hf.get("group_norm_size", 1),
        lightning_decay_offset=hf.get("lightning_decay_offset", 0),
        linear_silu=bool(hf.get("linear_silu", False) or hf.get("use_linear_silu", False)),
        layer_group_size=hf.get("layer_group_size"),
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=hf.get("kv_lora_rank"),
        qk_nope_head_dim=hf.get("qk_nope_head_dim"),
        qk_rope_head_dim=hf.get("qk_rope_head_dim"),
        v_head_dim=hf.get("v_head_dim"),
        num_nextn_predict_layers=hf.get("num_nextn_predict_layers") or 0,
        mtp_layer_kind=hf.get("mtp_layer_kind", "mla"),
        mtp_loss_scaling_factor=float(hf.get("mtp_loss_scaling_factor") or 0.0),
        **read_tokens(hf),
        **read_rope(hf),
        **ling_moe_fields(hf, layers),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_ling(c: ModelConfig) -> dict[str, Any]:
    """The `config.json` dict of a Ling-2.5/2.6 folder, every key that engines read written out (no `auto_map`)."""
    shared_width = c.moe_shared_expert_intermediate_size // max(c.num_shared_experts, 1)
    first_dense = min(c.moe_layers, default=c.num_hidden_layers)
    hf: dict[str, Any] = {
        "architectures": [LING_ARCHITECTURE],
        "model_type": LING_MODEL_TYPE,
        "hidden_act": "silu",
        "first_k_dense_replace": first_dense,
        "rotary_dim": c.rotary_dim,
        "rope_interleave": True,
        "use_linear_silu": c.linear_silu,
        "linear_rope": True,
        "num_kv_heads_for_linear_attn": c.num_attention_heads,
        "full_attention_type": "mla" if "mla" in c.layer_kinds else "gqa",
        "linear_backend": "seg_la",
        "mamba_ssm_dtype": "float32",
        "lightning_layerwise_decay": True,
        "router_dtype": "fp32",
        "scoring_func": c.score_function,
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "use_cache": True,
    }
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        hf[field.name] = list(value) if isinstance(value, tuple) else value
    hf["moe_shared_expert_intermediate_size"] = shared_width
    if c.moe_layers == tuple(range(first_dense, c.num_hidden_layers)):
        del hf["moe_layers"]
    if c.layer_group_size is None:  # a placement of its own: no number would be true, and readers want one where the key stands
        del hf["layer_group_size"]
    return hf
