"""What one migration does; no torch here. `preset("paper")` is the report's procedure, `preset("best")` ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from openling.config.section import Section, wrong
from openling.config.train import TrainConfig
from openling.errors import UserError, nearest

Stage = Literal["lightning", "linear-warmup", "mla", "mla-warmup"]
STAGES: tuple[Stage, ...] = ("lightning", "linear-warmup", "mla", "mla-warmup")


def _numbers(value: Any) -> Any:
    """Layer numbers as they are typed: 5,11,17, or a single one."""
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, str) or value in PLACEMENTS:
        return value
    parts = value.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise wrong(f"{', '.join(PLACEMENTS)}, or layer numbers such as 5,11,17", nearest(value, PLACEMENTS))
    return tuple(map(int, parts))


# Tokens that a layer still reads beside the first one, its own among them, where `layer_score` near takes the far ones from it.
NEAR = 64
PLACEMENTS = ("ling", "selected", "none")
MlaLayers = Annotated[Literal["ling", "selected", "none"] | tuple[int, ...], BeforeValidator(_numbers)]


class Conversion(Section):
    """The two conversions. Defaults are `best`."""

    kv_heads: Literal["replicate", "random"] = Field("replicate", description="new K/V heads; random also draws the gate")
    match_heads: bool = Field(True, description="permute heads so that far readers get slow decays")
    refit_norm: bool = Field(False, description="group norm of Lightning by least squares to the teacher's heads")
    refit_gate: bool = Field(False, description="Lightning's gate too, by one damped Newton step; includes refit_norm")
    refit_output: bool = Field(True, description="ridge regression of every output projection on propagated activations")
    layer_score: Literal["near", "kl", "local"] = Field(
        "near", description="for selected layers: what reading near tokens alone costs, or a Lightning mixer, in all or locally"
    )
    damping: float = Field(1e-3, gt=0, description="ridge strength over the mean squared activation")
    mla_damping: float = Field(0.1, gt=0, description="the same for outputs of MLA: old weights are near, texts differ")
    qk_norm_removal: Literal["pooled", "scalar", "ridge", "best"] = Field("best", description="best: least held-out error")
    query_weighted_rope: bool = Field(True, description="choose the shared rotated key by key and query energy")
    rope_fold: Literal["auto"] | int = Field(
        "auto", description="neighbouring frequencies that share the rotated key's components (FreqFold); auto: measured by layer"
    )
    balance: Literal["ratio", "weighted"] = Field("weighted", description="metric in which K and V share the latent")
    attention_weighted: bool = Field(True, description="fit MLA's keys and values by the attention that each token receives")
    kv_rank_budget: int | None = Field(
        None, gt=0, description="mean latent rank over the MLA layers, shared out by need; kv_lora_rank stays the width of all"
    )
    latent_norm: Literal["inverse", "rms", "channel", "refit"] = Field("refit", description="how MLA's latent norms are absorbed")


class Layout(Section):
    """What is new in the hybrid; None: scaled from the published models (`openling plan` shows it)."""

    mla_layers: MlaLayers = Field(
        "ling", description="ling: last of each group; selected: the most sensitive, as many; none: pure linear; or 5,11,17"
    )
    group_size: int | None = Field(None, description="layers per MLA layer: 2 is a ratio of 1:1, 4 of 3:1, 8 of 7:1, 16 of 15:1")
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    decay_offset: Literal[0, 1] = Field(0, description="0: as SGLang and vLLM serve it; 1: the official remote code")


class Text(Section):
    """Texts: built-in names, paths, or folders of `openling data build`; NAME=TEXT names an evaluation text.

    Tokens are read once and cut into windows of `sequence_length`.
    """

    calibration: tuple[str, ...] = ("python-docs", "python-code")
    evaluation: tuple[str, ...] = ("python-docs", "kjv")
    sequence_length: int = Field(512, gt=1)
    calibration_tokens: int = Field(32768, gt=0)
    evaluation_tokens: int = Field(8192, gt=0, description="per domain")


class Warmup(Section):
    """A warm-up: the training run and what it may change."""

    train: TrainConfig
    trainable: Literal["paper", "best", "attention"] = Field(
        "best", description="best adds gate and group norm; attention: all parameters of all mixers, for long warm-ups"
    )


class Recall(Section):
    """The grid of needle cases that are asked after each stage: every length with every depth.

    `keys` above 1 adds a second grid: to find one fact of several takes more than to repeat the only number in a text.
    """

    lengths: tuple[int, ...] = Field((128, 256, 512), description="tokens; beyond held-out text or model: left out")
    depths: tuple[float, ...] = Field((0.1, 0.5, 0.9), description="share of the text before the fact")
    samples: int = Field(2, gt=0, description="cases per length and depth")
    keys: int = Field(
        4, ge=1, le=20, description="facts in each text of a second grid, one of which is asked for; 1: no such grid"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if any(length < 1 for length in self.lengths) or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError("recall.lengths must rise and be positive")
        if not self.depths or any(not 0 <= depth <= 1 for depth in self.depths):
            raise ValueError("recall.depths must be shares from 0 to 1, at least one")
        return self


class Gates(Section):
    """Limits of what a stage may measure, on its worst text; outside them the run stops.

    null (false for `finite` and `stop`) switches a gate off. They may differ when a run resumes: that is how one
    goes on. Where the figures come from: docs/report.md.
    """

    stop: bool = Field(True, description="false: say and record what is outside its limit, and go on regardless")
    finite: bool = Field(True, description="no weight and no measured number is NaN or infinite")
    lightning_loss: float | None = Field(1.0, gt=0, description="after lightning: loss over ln(vocabulary), that of guessing")
    layer_error: float | None = Field(None, gt=0, description="after a conversion: a new layer's propagated error; zeros: 1")
    mla_step: float | None = Field(0.515, description="after mla: nats that the conversion adds to the loss")
    warmup_rise: float | None = Field(0.02, description="after a warm-up: nats by which its loss ends above its start")
    recall_drop: float | None = Field(
        None,
        ge=0,
        description="after a warm-up: share of needles lost, if the teacher finds over 0.95; null: a warning above 0.05",
    )
    final_gap: float | None = Field(None, description="after the last stage: nats above the teacher")


GATES_AFTER: dict[Stage, tuple[str, ...]] = {
    "lightning": ("lightning_loss", "layer_error"),
    "linear-warmup": ("warmup_rise", "recall_drop"),
    "mla": ("mla_step", "layer_error"),
    "mla-warmup": ("warmup_rise", "recall_drop"),
}


class MigrateConfig(Section):
    """One migration. `stages` stand in their published order."""

    preset: Literal["paper", "best"] = "best"
    stages: tuple[Stage, ...] = Field(STAGES, min_length=1)
    layout: Layout = Layout()
    conversion: Conversion = Conversion()
    text: Text = Text()
    linear_warmup: Warmup
    mla_warmup: Warmup
    recall: Recall = Recall()
    gates: Gates = Gates()
    dtype: Literal["source", "float32", "bfloat16"] = Field("source", description="of the written checkpoint")
    compare_start: bool = Field(False, description="measure also where the other preset's Lightning conversion starts")
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        ordered = tuple(stage for stage in STAGES if stage in self.stages)
        if self.stages != ordered:
            raise wrong("stages run in their published order, each once", f"stages = {','.join(ordered)}")
        placed = self.layout.mla_layers
        if self.layout.group_size is not None and placed not in ("ling", "selected"):
            named = "none" if placed == "none" else ",".join(map(str, placed))
            raise ValueError(
                f"--layout {named} says which layers are MLA: no --group-size beside it, or --layout ling or selected"
            )
        later = [stage for stage in self.stages if stage.startswith("mla")]
        far = self.text.sequence_length > NEAR
        if self.layout.mla_layers == "selected" and self.conversion.layer_score == "near" and not far:
            raise ValueError(
                f"--conversion.layer_score near needs --text.sequence_length above {NEAR}: no token is far otherwise; kl does not"
            )
        if later and placed in ("none", ()):
            raise ValueError(
                f"a pure linear model has no stage {later[0]}: --stage lightning or linear-warmup, or another --layout"
            )
        return self


def preset(name: str, *, tokens: int = 1_000_000, **changes: Any) -> MigrateConfig:
    """`paper` or `best` with `tokens` per warm-up; `changes` replace top-level fields."""
    # Learning rates: measured on SmolLM2-135M (docs/lab.md); the report prints none.
    if name == "best":
        train = TrainConfig(tokens=tokens, lr=5e-4, warmup_steps=10, schedule="cosine", weight_decay=0.0, ce=0.0, kl=1.0)
        warmup = Warmup(train=train)
        return MigrateConfig(**{"preset": "best", "linear_warmup": warmup, "mla_warmup": warmup} | changes)
    if name == "paper":
        train = TrainConfig(tokens=tokens, lr=1e-3, warmup_steps=10, schedule="constant", weight_decay=0.0, ce=1.0)
        warmup = Warmup(train=train, trainable="paper")
        conversion = Conversion(
            kv_heads="random",
            match_heads=False,
            refit_output=False,
            qk_norm_removal="pooled",
            rope_fold=1,
            query_weighted_rope=False,
            balance="ratio",
            attention_weighted=False,
            latent_norm="rms",
        )
        # The published start is worse than guessing, and the published MLA conversions add up to 1.44 nats to QK-norm's 0.515.
        gates = Gates(lightning_loss=None, mla_step=2.0)
        fields = {"preset": "paper", "conversion": conversion, "linear_warmup": warmup, "mla_warmup": warmup, "gates": gates}
        return MigrateConfig(**fields | changes)
    raise UserError(
        "unknown preset", where="--preset", value=name, expected="paper or best", nearest=nearest(name, ("paper", "best"))
    )
