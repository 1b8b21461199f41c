"""What all sections of a configuration have in common, and their refusals, told as openling tells its errors. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from openling.errors import UserError, nearest

# Pydantic's words, where openling has its own, by the kind of a finding.
WORDS = {
    "dict_type": "a table",
    "model_type": "a table",
    "missing": "a value, which has no default",
    "tuple_type": "a list",
    "too_short": "{min_length} or more of them",
    "too_long": "no more than {max_length} of them",
    "string_pattern_mismatch": "letters, digits, - and _, dots inside",
}
# What other trainers call a setting.
ELSEWHERE = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "max_tokens": "tokens",
    "seq_len": "sequence_length",
    "max_seq_length": "sequence_length",
    "global_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "max_grad_norm": "clip",
    "grad_clip": "clip",
    "lr_scheduler": "schedule",
    "num_warmup_steps": "warmup_steps",
}
SHOWN = 100  # characters of a value in an error
# What pydantic calls a member of a union.
MEMBER = re.compile(r"(literal|tuple|constrained-\w+|function-\w+)\[|int$")


class Section(BaseModel):
    """Frozen; an unknown key is an error, and so is true or false where a number or a name is meant: it would count as 1 or 0."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if _switches(value, inside=get_origin(kind) is dict) and not _named(kind) & {bool, Any}:
            raise wrong("a value, or null: this is no switch" if type(None) in _named(kind) else "a value: this is no switch")
        return value


def _switches(value: Any, *, inside: bool) -> bool:
    """Whether there is a boolean in it, or in a list; in tables that are no sections, `inside`, too."""
    if isinstance(value, dict):
        return inside and any(_switches(v, inside=True) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(_switches(v, inside=inside) for v in value)
    return isinstance(value, bool)


def _named(kind: Any) -> set[Any]:
    """An annotation and all that it is made of."""
    return {kind}.union(*map(_named, get_args(kind))) if kind.__hash__ else set()


def wrong(message: str, close: object = None) -> PydanticCustomError:
    """For validators: a refusal that knows the nearest settings that are valid."""
    return PydanticCustomError("setting", "{message}", {"message": message, "nearest": close})


def nearest_setting(key: str, known: Iterable[str]) -> str | None:
    """The setting that was meant: by what others call it, or the one that it most resembles."""
    names = list(known)
    return ELSEWHERE[key] if ELSEWHERE.get(key) in names else nearest(key, names)


def refusal(
    error: ValidationError, where: Callable[[str], object], what: str = "this setting is not valid", *, suggest: bool = True
) -> UserError:
    """What is found first: unknown keys before others, since another is missing where one is misspelt.

    where: how a dotted name is shown, the empty one being the whole. suggest: name the nearest valid value.
    """
    findings = error.errors()
    first = next((f for f in findings if f["type"] == "extra_forbidden"), findings[0])
    place = _place(first)
    if first["type"] == "extra_forbidden":
        known = [str(f["loc"][-1]) for f in findings if f["type"] == "missing" and f["loc"][:-1] == first["loc"][:-1]]
        key = str(first["loc"][-1])
        return UserError(
            "unknown setting", where=where(place), value=key, nearest=nearest_setting(key, known) if suggest else None
        )
    same = [f for f in findings if _place(f) == place]  # a union's members each say why they are not it
    expected = ", or ".join(dict.fromkeys(map(_expected, same)))
    close = next((c for c in map(_nearest, same) if c is not None), None) if suggest else None
    value = None if isinstance(first["input"], dict) or first["type"] == "missing" else first["input"]
    if len(shown := str(value)) > SHOWN:
        value = shown[: SHOWN - 3] + "..."
    return UserError(what, where=where(place), value=value, expected=expected, nearest=close)


def _place(finding: ErrorDetails) -> str:
    """The dotted name, without a union's members, which pydantic names as if they were parts."""
    return ".".join(part for part in map(str, finding["loc"]) if not MEMBER.match(part))


def _expected(finding: ErrorDetails) -> str:
    if finding["type"] in WORDS:
        return WORDS[finding["type"]].format(**finding.get("ctx", {}))
    return finding["msg"].removeprefix("Value error, ").removeprefix("Input should be ")


def _nearest(finding: ErrorDetails) -> object:
    kind, value = finding["type"], finding["input"]
    limits: Mapping[str, Any] = finding.get("ctx", {})
    if kind == "literal_error":
        return nearest(value, re.findall("'([^']*)'", limits["expected"])) if isinstance(value, str) else None
    for name, step in (("ge", 0), ("le", 0), ("gt", 1), ("lt", -1)):
        bound = limits.get(name)
        if isinstance(bound, int):
            return bound + step
        if bound is not None and not step:  # no fraction is nearest to a bound that is left out
            return f"{bound:g}"
    return limits.get("nearest")
