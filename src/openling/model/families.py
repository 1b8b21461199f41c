"""The families whose checkpoints openling reads: one row each, config.json keys to `ModelConfig`.

A row is chosen by `architectures[0]`; the tensor names of the same families are in `weights/names.py`. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from openling.errors import UserError, nearest
from openling.model.config import LING_ARCHITECTURE, ModelConfig, ling_moe_fields, need, read_ling, read_rope, read_tokens

LAYER_COUNTS = ("num_hidden_layers", "num_nextn_predict_layers")
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Family:
    """One row: the architecture's name in config.json and how its keys are read."""

    architecture: str
    read: Callable[[dict[str, Any]], ModelConfig]


def _common(hf: dict[str, Any], *, partial_rotary: bool = False) -> dict[str, Any]:
    rope = read_rope(hf)
    if not partial_rotary and (factor := rope["partial_rotary_factor"]) != 1:
        what = "transformers rotates whole heads in this architecture, whatever this key says"
        raise UserError(what, where="partial_rotary_factor", value=factor, expected="1, or no such key")
    layers, hidden, heads = (need(hf, k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    window = hf.get("sliding_window")
    if window and hf.get("use_sliding_window", True) and window < (hf.get("max_position_embeddings") or 0):
        raise UserError(
            "sliding-window attention is not supported: its layers would have to be converted as full attention",
            where="sliding_window",
            value=window,
            expected="null, or at least max_position_embeddings",
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError("unsupported activation", where="hidden_act", value=hf["hidden_act"], expected="silu (SwiGLU)")
    return dict(
        vocab_size=need(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=hf.get("intermediate_size") or 0,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=hf.get("num_key_value_heads", heads),
        head_dim=hf.get("head_dim") or hidden // heads,
        layer_kinds=("gqa",) * layers,
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        initializer_range=hf.get("initializer_range", 0.02),
        max_position_embeddings=hf.get("max_position_embeddings") or 4096,
        mtp_layer_kind="gqa",
        **read_tokens(hf),
        **rope,
    )


def _llama(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(**_common(hf), use_qkv_bias=bias, use_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False)))


def _qwen2(hf: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**_common(hf | {"use_sliding_window": hf.get("use_sliding_window", False)}), use_qkv_bias=True)


def _qwen3(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    hf = hf | {"use_sliding_window": hf.get("use_sliding_window", False), "head_dim": hf.get("head_dim") or 128}
    return ModelConfig(**_common(hf), use_qkv_bias=bias, use_bias=bias, gqa_qk_norm=True)


def _qwen3_moe(hf: dict[str, Any]) -> ModelConfig:
    layers, step, dense = need(hf, "num_hidden_layers"), hf.get("decoder_sparse_step") or 1, set(hf.get("mlp_only_layers") or ())
    bias = bool(hf.get("attention_bias", False))
    hf = hf | {"use_sliding_window": hf.get("use_sliding_window", False)}
    experts = need(hf, "num_experts" if "num_experts" in hf else "num_local_experts")  # transformers 5 writes the second
    return ModelConfig(
        **_common(hf),
        use_qkv_bias=bias,
        use_bias=bias,
        gqa_qk_norm=True,
        moe_layers=tuple(i for i in range(layers) if i not in dense and experts > 0 and (i + 1) % step == 0),
        num_experts=experts,
        num_experts_per_tok=need(hf, "num_experts_per_tok"),
        moe_intermediate_size=need(hf, "moe_intermediate_size"),
        score_function="softmax",
        norm_topk_prob=bool(hf.get("norm_topk_prob", False)),
    )


def _mixtral(hf: dict[str, Any]) -> ModelConfig:
    layers = need(hf, "num_hidden_layers")
    return ModelConfig(
        **_common(hf),
        moe_layers=tuple(range(layers)),
        num_experts=need(hf, "num_local_experts"),
        num_experts_per_tok=need(hf, "num_experts_per_tok"),
        moe_intermediate_size=need(hf, "intermediate_size"),
        score_function="softmax",
    )


def _ling2(hf: dict[str, Any]) -> ModelConfig:
    layers = need(hf, "num_hidden_layers")
    qk_norm = bool(hf.get("use_qk_norm", True))
    return ModelConfig(
        **_common(hf, partial_rotary=True),
        use_qkv_bias=bool(hf.get("use_qkv_bias", False)),
        use_bias=bool(hf.get("use_bias", False)),
        use_qk_norm=qk_norm,
        gqa_qk_norm=qk_norm,
        num_nextn_predict_layers=hf.get("num_nextn_predict_layers") or 0,
        mtp_loss_scaling_factor=float(hf.get("mtp_loss_scaling_factor") or 0.0),
        **ling_moe_fields(hf, layers),
    )


FAMILIES: dict[str, Family] = {
    row.architecture: row
    for row in (
        Family(LING_ARCHITECTURE, read_ling),
        Family("BailingMoeV2ForCausalLM", _ling2),
        Family("LlamaForCausalLM", _llama),
        Family("MistralForCausalLM", _llama),
        Family("Qwen2ForCausalLM", _qwen2),
        Family("Qwen3ForCausalLM", _qwen3),
        Family("Qwen3MoeForCausalLM", _qwen3_moe),
        Family("MixtralForCausalLM", _mixtral),
    )
}


def family_of(hf: dict[str, Any], *, where: object = None) -> Family:
    """The row for a config.json dict."""
    names = hf.get("architectures") or []
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    name = str(names) if not listed else names[0] if names else str(hf.get("model_type"))
    if name not in FAMILIES:
        raise UserError(
            "unknown architecture",
            where=where,
            value=name,
            expected=", ".join(FAMILIES),
            nearest=nearest(name, FAMILIES),
        )
    return FAMILIES[name]


def read_config(hf: dict[str, Any], *, where: object = None) -> ModelConfig:
    """`ModelConfig` from any supported config.json dict."""
    hf = {key: value for key, value in hf.items() if value is not None}  # as if the key were not there
    family = family_of(hf, where=where)
    _check_kinds(hf, where)
    try:
        return family.read(hf)
    except UserError as error:  # which names a key
        if where is None:
            raise
        raise UserError(error.what, **error.parts | {"where": f"{where}, {error.parts['where']}"}) from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        what = "config.json has a value of the wrong kind"
        raise UserError(what, where=where, value=error, expected=f"the keys of {family.architecture}") from error


def _check_kinds(hf: dict[str, Any], where: object) -> None:
    """Numbers and switches where `ModelConfig` has them, and not so many layers that to list them takes long."""
    for name, kind in get_type_hints(ModelConfig).items():
        value, kinds = hf.get(name), {kind, *get_args(kind)}
        place = name if where is None else f"{where}, {name}"
        if value is None or not kinds & {int, float, bool} or isinstance(value, list):
            continue
        if bool in kinds:
            ok, expected = value in (True, False), "true or false"
        elif int in kinds:
            ok, expected = isinstance(value, int) and not isinstance(value, bool), "an integer"
        else:
            ok, expected = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
        if not ok:
            what = "config.json has a value of the wrong kind"
            raise UserError(what, where=place, value=repr(value), expected=expected)
        if name in LAYER_COUNTS and value > MOST_LAYERS:
            raise UserError("no model has so many layers", where=place, value=value, expected=f"{MOST_LAYERS} at most")
