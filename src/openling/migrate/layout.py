"""The hybrid that a migration of a GQA model yields: which layers become what, and every width and rank that is new.

Lightning everywhere but in the last layer of each group, which becomes MLA, as in Ling-2.6 (arXiv 2606.15079, section 2); or
MLA in layers that were chosen (`select.py`) or named; or in none.
"""

from __future__ import annotations

from typing import Any, Literal

from openling.config.migrate import MlaLayers
from openling.errors import UserError
from openling.model.config import LayerKind, ModelConfig

Stage = Literal["lightning", "mla"]

PUBLISHED_GROUP = 8


def target_config(
    source: ModelConfig,
    *,
    mla_layers: MlaLayers = "ling",
    group_size: int | None = None,
    kv_lora_rank: int | None = None,
    q_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    decay_offset: int = 0,
) -> ModelConfig:
    """The hybrid's configuration. What is left None follows the published sizes, scaled to `source`:

    - group_size: 8, or the nearest divisor of the layer count (`default_group_size`);
    - mla_layers: the last of each group. Until `select.py` has chosen, these stand for selected ones, which are as many; any
      group size will do then;
    - qk_rope_head_dim: the teacher's rotated dims, which stock engines require of this layout;
    - kv_lora_rank: at most 512 and 60 % of the teacher's own rank 2KD - qk_rope_head_dim, in steps of 32;
    - q_lora_rank: at most 1536 and 2/3 of hidden_size, in steps of 64.

    MLA heads keep the teacher's head dim for nope and value. Embeddings are untied, because engines cannot tie them.
    `layer_group_size` stays None for a placement that it cannot express: stock engines know no other key.
    Raises UserError for a model that is not all GQA, a group size that does not divide the layers, or a bad width.
    """
    _check_source(source)
    kinds, group = _hybrid_kinds(source.num_hidden_layers, mla_layers, group_size)
    rope = source.rotary_dim if qk_rope_head_dim is None else qk_rope_head_dim
    if rope < 2 or rope % 2 or source.rotary_dim % rope:
        expected = f"an even divisor of the {source.rotary_dim} rotated dims of a head"
        raise UserError(
            "the rotated dims of MLA must fold those of the teacher evenly",
            where="--layout.qk_rope_head_dim",
            value=rope,
            expected=expected,
        )
    kv_rows = 2 * source.num_key_value_heads * source.head_dim
    q_rows = source.num_attention_heads * (source.head_dim + rope)
    kv_rank = min(kv_rows, max(32, min(512, (kv_rows - rope) * 3 // 5 // 32 * 32))) if kv_lora_rank is None else kv_lora_rank
    q_rank = min(q_rows, max(32, min(1536, 2 * source.hidden_size // 3 // 64 * 64))) if q_lora_rank is None else q_lora_rank
    for name, rank, rows in (("kv_lora_rank", kv_rank, kv_rows), ("q_lora_rank", q_rank, q_rows)):
        if not 1 <= rank <= rows:
            what = "a rank lies between 1 and the rows it compresses"
            raise UserError(what, where=f"--layout.{name}", value=rank, expected=f"1 to {rows}")
    return source.replace(
        layer_kinds=kinds,
        layer_group_size=group,
        mtp_layer_kind="mla" if "mla" in kinds else source.mtp_layer_kind,
        tie_word_embeddings=False,
        use_qk_norm=True,
        group_norm_size=norm_groups(source.num_attention_heads),
        lightning_decay_offset=decay_offset,
        q_lora_rank=q_rank,
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=source.head_dim,
        qk_rope_head_dim=rope,
        v_head_dim=source.head_dim,
    )


def stage_kinds(source: ModelConfig, target: ModelConfig, stage: Stage) -> tuple[LayerKind, ...]:
    """`layer_kinds` once a conversion is done: after `lightning` the future MLA layers are still the teacher's GQA."""
    if stage == "mla":
        return target.layer_kinds
    return tuple(new if new == "lightning" else old for old, new in zip(source.layer_kinds, target.layer_kinds, strict=True))


def lightning_stage(config: ModelConfig, layout: dict[str, Any]) -> ModelConfig:
    """After the Lightning conversion of a GQA model: Lightning everywhere but in the future MLA layers."""
    if set(config.layer_kinds) != {"gqa"}:
        raise UserError(
            "this model is converted already, wholly or in part",
            where="stage lightning",
            value=kinds_of(config),
            expected="softmax (GQA or MHA) attention in every layer",
            next=next_stage(config),
        )
    target = target_config(config, **layout)
    kinds = stage_kinds(config, target, "lightning")
    return target.replace(layer_kinds=kinds, mtp_layer_kind=config.mtp_layer_kind)


def mla_stage(config: ModelConfig, layout: dict[str, Any]) -> ModelConfig:
    """After the MLA conversion: every GQA layer is MLA; widths from the checkpoint's config where an earlier stage wrote them."""
    if "gqa" not in config.layer_kinds:
        what = "there is no GQA layer left to convert"
        raise UserError(what, where="stage mla", value=kinds_of(config), expected="GQA layers", next=next_stage(config))
    kinds: tuple[LayerKind, ...] = tuple("mla" if kind == "gqa" else kind for kind in config.layer_kinds)
    plain = config.replace(layer_kinds=("gqa",) * config.num_hidden_layers, mtp_layer_kind="gqa")
    defaults = target_config(plain, **layout)
    widths = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    chosen = {w: layout.get(w) or getattr(config, w) or getattr(defaults, w) for w in widths}
    # Every layer MLA is, in the published layout, groups of one.
    group = 1 if set(kinds) == {"mla"} else config.layer_group_size
    return config.replace(layer_kinds=kinds, mtp_layer_kind="mla", layer_group_size=group, **chosen)


def kinds_of(config: ModelConfig) -> str:
    """The layers by kind, in words."""
    return ", ".join(f"{config.layer_kinds.count(kind)} {kind}" for kind in sorted(set(config.layer_kinds))) + " layers"


def next_stage(config: ModelConfig) -> str:
    """The stages that can follow on a model of this configuration."""
    kinds = set(config.layer_kinds)
    if "gqa" not in kinds:
        return "--stage linear-warmup or mla-warmup with --teacher, which need no conversion"
    return "--stage linear-warmup, then mla" if "lightning" in kinds else "--stage lightning first, or no --stage for all four"


def default_group_size(layers: int) -> int:
    """8 where it divides the layer count, else the divisor (2 or more) nearest to 8; of two equally near, the smaller.

    The smaller of two keeps more MLA layers, which long recall rests on.
    """
    sizes = _divisors(layers)
    if not sizes:
        raise UserError(
            "one layer cannot hold both kinds of attention", where="num_hidden_layers", value=layers, expected="2 or more"
        )
    return min(sizes, key=lambda size: (abs(size - PUBLISHED_GROUP), size))


def group_size_reason(layers: int, group: int) -> str:
    """One sentence: why the layers are grouped so."""
    if group == PUBLISHED_GROUP:
        return f"groups of {group}, as Ling-2.6"
    default, mirror = default_group_size(layers), 2 * PUBLISHED_GROUP - group
    if group != default:
        return f"groups of {group}, as asked (Ling-2.6: {PUBLISHED_GROUP}; default here: {default})"
    tie = f" ({mirror} is as near, with fewer MLA layers)" if mirror in _divisors(layers) else ""
    return f"groups of {group}: Ling-2.6's {PUBLISHED_GROUP} does not divide {layers} layers, {group} is the nearest divisor{tie}"


def norm_groups(heads: int) -> int:
    """Groups of the Lightning output norm: 8 heads each, as published (64 heads: 8 groups; 32: 4).

    Below 32 heads, or where 8 does not divide them, one group per head: the finest norm, and any tensor split respects it.
    """
    return heads // 8 if heads >= 32 and heads % 8 == 0 else heads


def layout_reason(layers: int, mla_layers: MlaLayers, group_size: int | None) -> str:
    """One sentence: why which layers are MLA."""
    if mla_layers in ("none", ()):
        return "pure linear: no layer is MLA"
    if mla_layers == "selected":
        count = len(even_layers(layers, group_size))
        return f"{count} of {layers} layers are MLA, those of the highest scores (Ling-2.6: the last of each group)"
    if mla_layers == "ling":
        return group_size_reason(layers, default_group_size(layers) if group_size is None else group_size)
    return f"MLA in layers {', '.join(map(str, mla_layers))}, as asked (Ling-2.6: the last of each group)"


def even_layers(layers: int, group_size: int | None) -> tuple[int, ...]:
    """The last layer of each whole group."""
    group = default_group_size(layers) if group_size is None else group_size
    return tuple(range(group - 1, layers, group))


def _hybrid_kinds(layers: int, mla_layers: MlaLayers, group_size: int | None) -> tuple[tuple[LayerKind, ...], int | None]:
    """The layers' kinds, and the group size that says the same where there is one."""
    if mla_layers == "ling":
        _check_group_size(layers, default_group_size(layers) if group_size is None else group_size)
    elif group_size is not None and not 2 <= group_size <= layers:
        expected = f"2 to {layers}, the number of layers"
        raise UserError("a group holds one MLA layer and others", where="--group-size", value=group_size, expected=expected)
    chosen: tuple[int, ...]
    if mla_layers == "ling" or mla_layers == "selected":
        chosen = even_layers(layers, group_size)
    else:
        chosen = () if mla_layers == "none" else mla_layers
        _check_layers(layers, chosen)
    kinds: tuple[LayerKind, ...] = tuple("mla" if i in chosen else "lightning" for i in range(layers))
    group = chosen[0] + 1 if chosen else 0
    return kinds, group if group and layers % group == 0 and chosen == even_layers(layers, group) else None


def _check_layers(layers: int, chosen: tuple[int, ...]) -> None:
    if list(chosen) != sorted({i for i in chosen if 0 <= i < layers}) or len(chosen) == layers:
        raise UserError(
            "these cannot be the MLA layers",
            where="--layout",
            value=",".join(map(str, chosen)),
            expected=f"rising numbers from 0 to {layers - 1}, not all of them",
        )


def _divisors(layers: int) -> list[int]:
    return [size for size in range(2, layers + 1) if layers % size == 0]


def _check_source(source: ModelConfig) -> None:
    converted = [kind for kind in source.layer_kinds if kind != "gqa"]
    if converted:
        raise UserError(
            "this model is already converted, wholly or in part: only a GQA model can be migrated",
            where="layer_kinds",
            value=f"{len(converted)} of {len(source.layer_kinds)} layers are {' or '.join(sorted(set(converted)))}",
            expected="softmax (GQA or MHA) attention in every layer",
        )


def _check_group_size(layers: int, group: int) -> None:
    sizes = _divisors(layers)
    if group in sizes:
        return
    below = [size for size in sizes if size < group][-1:]
    above = [size for size in sizes if size > group][:1]
    raise UserError(
        "the group size must divide the number of layers",
        where="--group-size",
        value=group,
        expected=f"a divisor of {layers}, 2 or more",
        nearest=" or ".join(map(str, below + above)) or None,
    )
