"""What a stage of training reads: shares of groups, the sources in each, lengths; no torch here.

Published mixtures of Ling 2.6 (arXiv 2606.15079, pages 9-10 and figure 4) are presets. Figure and text disagree on continued
pre-training, so both are named and neither is a default.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from fractions import Fraction
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from openling.config.section import Section, refusal, wrong
from openling.errors import UserError, nearest

# Weights are tokens^(1/temperature): of 10^13 tokens still a number.
LEAST_TEMPERATURE = 0.1


class SourceConfig(Section):
    """A source of a built corpus, and what part of its group it is."""

    corpus: str = Field(description="folder that `openling data build` wrote")
    source: str | None = Field(None, description="its name there; null: the only one")
    group: str = Field("all", description="which share it belongs to")
    weight: float | None = Field(None, gt=0, description="part of the group, in tokens; null: by size, see temperature")
    repeat: float = Field(1, gt=0, description="epochs at most; beyond it the mixture cannot be met")
    by: Literal["language"] | None = Field(None, description="language: each of its languages is a source of its own")
    languages: tuple[str, ...] | None = Field(None, min_length=1, description="which of them; null: all that are there")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.languages is not None and self.by is None:
            raise ValueError('languages are chosen of a source with by = "language"')
        if self.languages is not None and len(set(self.languages)) < len(self.languages):
            raise ValueError(f"a language is named twice: {', '.join(self.languages)}")
        return self


class LongConfig(Section):
    """Rows of long documents among rows that hold several shorter windows."""

    length: int = Field(gt=1, description="tokens of a long window, and of every row")
    share: float = Field(gt=0, lt=1, description="part of the windows, or of the tokens, that is long")
    of: Literal["sequences", "tokens"] = Field("sequences", description="what the share is counted in")
    min_document: int | None = Field(None, gt=1, description="shortest document read here, the rest is read short; null: length")


class MixtureConfig(Section):
    """Groups with exact shares of the tokens. Shares must come to 1; every group needs a source."""

    shares: dict[str, PositiveFloat] = Field({"all": 1.0}, description="part of the tokens that each group gives")
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    temperature: dict[str, float] = Field({}, description="of a group: sources weigh tokens^(1/temperature); 1 where not named")
    length: int = Field(4096, gt=1, description="tokens of a window")
    long: LongConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        total = sum(Fraction(str(share)) for share in self.shares.values())
        if total != 1:
            raise ValueError(f"shares must come to 1, they come to {float(total):g}")
        groups = {s.group for s in self.sources}
        _check_groups("shares of groups that have a source", self.shares, groups)
        _check_groups("sources of groups that have a share", groups, self.shares.keys())
        for group in groups:
            if len({s.weight is None for s in self.sources if s.group == group}) > 1:
                raise ValueError(f"give a weight to all sources of the group {group}, or to none")
        _check_groups("temperatures of groups that have a share", self.temperature, groups)
        if any(t < LEAST_TEMPERATURE for t in self.temperature.values()):
            raise ValueError(f"temperatures must be at least {LEAST_TEMPERATURE}")
        if self.long is not None and (self.long.length <= self.length or self.long.length % self.length):
            raise ValueError(f"long.length must be a multiple of length = {self.length}, got {self.long.length}")
        return self

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.length if self.long is None else self.long.length


def _check_groups(what: str, named: Iterable[str], there: Set[str]) -> None:
    """A refusal of the first named group that is not there, with the nearest one that is."""
    for group in sorted(set(named) - there):
        raise wrong(f"{what}: {group!r} is none of {', '.join(sorted(there))}", nearest(group, there))


_TEXT = {"reasoning": 0.46, "general": 0.5, "multilingual_web": 0.028, "multilingual_capability": 0.012}
_20_PERCENT_32K = {"length": 4096, "long": {"length": 32768, "share": 0.2, "of": "sequences"}}

# Of the migration's 400 B tokens only the 4 % of multilingual text are published; it has no preset. Multilingual text is 70 %
# web and 30 % capability (mathematics, code, exams, parallel text) there and in continued pre-training.
MIXTURES: dict[str, dict[str, Any]] = {
    "cpt_figure": {"shares": {"general": 0.64, "reasoning": 0.36}, "length": 4096},
    "cpt_text": {"shares": _TEXT, "length": 4096},
    "mid1_figure": {"shares": {"general": 0.67, "reasoning": 0.33}} | _20_PERCENT_32K,
    # The text says "like the previous stage"; that this means cpt_text is our reading.
    "mid1_text": {"shares": _TEXT} | _20_PERCENT_32K,
    "mid2": {"shares": {"general": 0.47, "reasoning": 0.53}, "length": 32768},
    "mid3": {"shares": {"general": 0.43, "reasoning": 0.42, "agentic": 0.15}, "length": 262144},
}


def mixture_preset(name: str, sources: tuple[SourceConfig, ...], *, where: object = None, **changes: Any) -> MixtureConfig:
    """A published mixture over your sources, whose `group` names the share they belong to."""
    if not isinstance(name, str) or name not in MIXTURES:
        close = nearest(str(name), MIXTURES)
        raise UserError("there is no such mixture", where=where, value=name, expected=", ".join(MIXTURES), nearest=close)
    return MixtureConfig(**MIXTURES[name] | {"sources": sources} | changes)


def read_mixture(fields: dict[str, Any], *, where: object = None) -> MixtureConfig:
    """The mixture of a TOML table: MixtureConfig's fields, or `preset` with sources and changes; mistakes are `UserError`s."""
    from pydantic import ValidationError

    fields = dict(fields)
    preset = fields.pop("preset", None)
    known = ["preset", *MixtureConfig.model_fields]
    if unknown := next((key for key in fields if key not in known), None):
        close = nearest(unknown, known)
        raise UserError("unknown setting of a mixture", where=where, value=unknown, expected=", ".join(known), nearest=close)
    try:
        if preset is None:
            return MixtureConfig(**fields)
        return mixture_preset(preset, fields.pop("sources", ()), where=where, **fields)
    except ValidationError as error:
        raise refusal(error, lambda name: f"{where}, {name or 'the mixture'}", "the mixture is not valid") from error
