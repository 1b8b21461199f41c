"""The families whose checkpoints openling reads: one row each, config.json keys to `ModelConfig`.

A row is chosen by `architectures[0]`; the tensor names of the same families are in `weights/names.py`. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from openling.errors import UserError, nearest
from openling.model.config import LING_ARCHITECTURE, ModelConfig, ling_moe_fields, need, read_ling, read_rope, read_tokens

# Far above every model, and so low that no product of them overflows; more layers would take long to list.
MOST_OF = {"num_hidden_layers": "layers", "num_nextn_predict_layers": "layers", "vocab_size": "tokens", "num_experts": "experts"}
MOST = {"num_hidden_layers": 10_000, "num_nextn_predict_layers": 10_000, "vocab_size": 2**24}
MOST |= dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts"), 2**14)
MOST |= dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim"), 2**20)
MOST |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 2**20)
MOST |= dict.fromkeys(("moe_shared_expert_intermediate_size", "num_shared_experts", "num_experts_per_tok"), 2**20)


def _kinds() -> dict[str, type]:
    """bool, int or float by key: those of `ModelConfig` and those that only the readers know."""
    switches = ("attention_bias", "mlp_bias", "use_sliding_window", "use_linear_silu")
    counts = ("num_local_experts", "decoder_sparse_step", "first_k_dense_replace", "sliding_window")
    kinds: dict[str, type] = dict.fromkeys(switches, bool) | dict.fromkeys(counts, int)
    for name, hint in get_type_hints(ModelConfig).items():
        either = {hint, *get_args(hint)} if get_origin(hint) is not tuple else set()
        if not name.endswith("_token_id") and (found := [kind for kind in (bool, int, float) if kind in either]):
            kinds[name] = found[0]
    return kinds


KINDS = _kinds()
ABSENT = "absent keys"  # under this name the readers find the keys that config.json lacks and the family's row stands for


@dataclass(frozen=True)
class Family:
    """One row: the architecture's name in config.json, how its keys are read, and what absent keys mean.

    `absent` is from transformers 5, models/*/configuration_*.py, where it is not what `ModelConfig` says; null is another thing.
    """

    architecture: str
    read: Callable[[dict[str, Any]], ModelConfig]
    absent: dict[str, Any] = field(default_factory=dict)


def _common(hf: dict[str, Any], *, partial_rotary: bool = False) -> dict[str, Any]:
    rope = read_rope(hf)
    if not partial_rotary and (factor := rope["partial_rotary_factor"]) != 1:
        what = "transformers rotates whole heads in this architecture, whatever this key says"
        raise UserError(what, where="partial_rotary_factor", value=factor, expected="1, or no such key")
    layers, hidden, heads = (need(hf, k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    window, longest = hf.get("sliding_window"), hf.get("max_position_embeddings") or 4096
    if window and window < longest:
        raise UserError(
            "sliding-window attention is not supported: its layers would have to be converted as full attention",
            where="sliding_window",
            value=f"{window}, which transformers takes where the key is absent"
            if "sliding_window" in hf.get(ABSENT, ())
            else window,
            expected=f"null, or at least max_position_embeddings = {longest}",
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
        max_position_embeddings=longest,
        mtp_layer_kind="gqa",
        **read_tokens(hf),
        **rope,
    )


def _with_switch(hf: dict[str, Any], *, default: bool = False) -> dict[str, Any]:
    """The keys less the window, where the architecture has a switch for it that is off."""
    on = hf.get("use_sliding_window", default)
    return hf if on else {key: value for key, value in hf.items() if key != "sliding_window"}


def _llama(hf: dict[str, Any]) -> ModelConfig:
    hf = _with_switch(hf, default=True)
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(**_common(hf), use_qkv_bias=bias, use_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False)))


def _mistral(hf: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**_common(hf))  # no biases and no switch of the window, whatever the keys of other families say


def _qwen2(hf: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**_common(_with_switch(hf)), use_qkv_bias=True)


def _qwen3(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(**_common(_with_switch(hf)), use_qkv_bias=bias, use_bias=bias, gqa_qk_norm=True)


def _qwen3_moe(hf: dict[str, Any]) -> ModelConfig:
    layers, step, dense = need(hf, "num_hidden_layers"), hf.get("decoder_sparse_step") or 1, set(hf.get("mlp_only_layers") or ())
    bias = bool(hf.get("attention_bias", False))
    experts = need(hf, "num_experts" if "num_experts" in hf else "num_local_experts")  # transformers 5 writes the second
    return ModelConfig(
        **_common(_with_switch(hf)),
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


_MISTRAL: dict[str, Any] = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN: dict[str, Any] = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}

FAMILIES: dict[str, Family] = {
    row.architecture: row
    for row in (
        Family(LING_ARCHITECTURE, read_ling),
        Family("BailingMoeV2ForCausalLM", _ling2),
        Family("LlamaForCausalLM", _llama, {"max_position_embeddings": 2048}),
        Family("MistralForCausalLM", _mistral, _MISTRAL | {"sliding_window": 4096}),
        Family("Qwen2ForCausalLM", _qwen2, _QWEN),
        Family("Qwen3ForCausalLM", _qwen3, _QWEN | {"head_dim": 128}),
        Family("Qwen3MoeForCausalLM", _qwen3_moe, _QWEN | {"num_key_value_heads": 4}),
        Family("MixtralForCausalLM", _mixtral, _MISTRAL | {"rope_theta": 1e6, "rms_norm_eps": 1e-5}),
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
    family = family_of(hf, where=where)
    absent = {key: value for key, value in family.absent.items() if key not in hf}
    hf = {key: value for key, value in hf.items() if value is not None} | absent
    _check_kinds(hf, where)
    try:
        return family.read(_one_rope(hf) | {ABSENT: tuple(absent)})
    except UserError as error:  # which names a key
        if where is None:
            raise
        raise UserError(error.what, **error.parts | {"where": f"{where}, {error.parts['where']}"}) from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        what = "config.json has a value of the wrong kind"
        raise UserError(what, where=where, value=error, expected=f"the keys of {family.architecture}") from error


def _one_rope(hf: dict[str, Any]) -> dict[str, Any]:
    """The keys with one description of RoPE: as in transformers 5, `rope_scaling` counts where both are, whole.

    See `RotaryEmbeddingConfigMixin` in its modeling_rope_utils.py: nothing of `rope_parameters` is merged in, not even its
    theta, and an original length beside the description counts before the one in it.
    """
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = dict(hf.get(name) or {})
    by_layer = sorted(key for key, value in rope.items() if isinstance(value, dict))
    if by_layer:
        what = "positions that differ by the kind of layer are not supported"
        raise UserError(what, where=name, value=", ".join(by_layer), expected="one rope_type and rope_theta for all layers")
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    kind = rope.get("rope_type") or rope.get("type")
    numbers = isinstance(fast, int | float) and isinstance(slow, int | float)  # others are refused where all keys are checked
    if kind == "yarn" and numbers and fast < slow:
        what = "this RoPE scaling cannot be: its ramp would fall from the slow pairs to the fast ones"
        raise UserError(what, where=f"{name}.beta_fast", value=fast, expected=f"at least beta_slow = {slow}")
    if kind in ("yarn", "llama3") and (original := hf.get("original_max_position_embeddings")):
        rope["original_max_position_embeddings"] = original
    rest = {key: value for key, value in hf.items() if key not in ("rope_scaling", "rope_parameters")}
    return rest | ({name: rope} if rope else {})


def _check_kinds(hf: dict[str, Any], where: object) -> None:
    """Numbers, switches and lists where the families have them, and no sizes that no model has: shapes would overflow."""

    def check(ok: bool, name: str, expected: str, what: str = "config.json has a value of the wrong kind") -> None:
        if not ok:
            place = name if where is None else f"{where}, {name}"
            raise UserError(what, where=place, value=repr(hf[name]), expected=expected)

    for name in hf.keys() & KINDS.keys():
        value, kind = hf[name], KINDS[name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if kind is bool:
            check(value in (True, False), name, "true or false")  # 1 is true: recipes write it so
        elif kind is int:
            check(whole, name, "an integer")
        elif kind is float:
            check(whole or isinstance(value, float), name, "a number")
            check(math.isfinite(value) if isinstance(value, float) else abs(value) < 2**1023, name, "a finite number")
    for name in hf.keys() & MOST.keys():
        value = hf[name]
        check(value <= MOST[name], name, f"{MOST[name]} at most", f"no model has so many {MOST_OF.get(name, 'values there')}")
        check(value >= 0, name, "an integer that is not negative")
    for name in hf.keys() & {"bos_token_id", "eos_token_id", "pad_token_id"}:
        ids = hf[name] if name == "eos_token_id" and isinstance(hf[name], list) else [hf[name]]
        listed = " or a list of them" if name == "eos_token_id" else ""
        check(all(isinstance(i, int) and not isinstance(i, bool) for i in ids), name, f"a token's number{listed}")
    for name in hf.keys() & {"rope_scaling", "rope_parameters"}:
        check(isinstance(hf[name], dict), name, '{"rope_type": ...}, or no such key')
    layers = hf.get("mlp_only_layers", [])
    check(isinstance(layers, list) and all(isinstance(i, int) for i in layers), "mlp_only_layers", "a list of layer numbers")
    if "rms_norm_eps" in hf:
        check(0 < hf["rms_norm_eps"] < 1, "rms_norm_eps", "a small number above 0")
    if "initializer_range" in hf:
        check(0 <= hf["initializer_range"] <= 1, "initializer_range", "a number from 0 to 1")
