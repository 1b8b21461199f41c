"""Command-line overrides of a configuration: `--section.field value`, checked against the schema, typos answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from openling.config.section import refusal
from openling.errors import UserError, nearest

Config = TypeVar("Config", bound=BaseModel)


def field_names(config: BaseModel, prefix: str = "") -> list[str]:
    """Every settable field as a dotted name."""
    names: list[str] = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        dotted = f"{prefix}{name}"
        names += field_names(value, f"{dotted}.") if isinstance(value, BaseModel) else [dotted]
    return names


def override(config: Config, arguments: Sequence[str], *, flags: Sequence[str] = ()) -> Config:
    """A copy of `config` with `--a.b value` or `--a.b=value` pairs applied; unknown names and bad values are `UserError`s.

    flags: what else the command line takes, for the answer to a typo.
    """
    data = config.model_dump()
    names = field_names(config)
    for name, text in _pairs(arguments, names, flags):
        section = data
        *parents, last = name.split(".")
        for parent in parents:
            section = section[parent]
        section[last] = _value(text, section[last])
    try:
        return type(config).model_validate(data)
    except ValidationError as error:
        raise refusal(error, lambda name: f"--{name}" if name else "the settings together") from error


def _pairs(arguments: Sequence[str], names: list[str], flags: Sequence[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in names:
            close = nearest(flag, [*flags, *(f"--{known}" for known in names)])
            raise UserError("unknown argument", value=flag, expected="a flag of --help, or --section.field", nearest=close)
        if not equals:
            if not rest:
                raise UserError("this setting needs a value", where=flag, expected=f"{flag} VALUE")
            text = rest.pop(0)
        found.append((name, text))
    return found


def _value(text: str, old: Any) -> Any:
    """JSON where it parses (numbers, booleans, null, lists), else the word itself; commas make a list where one stands now."""
    if isinstance(old, (tuple, list)) and not text.startswith("["):
        return [part.strip() for part in text.split(",")]
    try:
        return json.loads(text)
    except ValueError:  # a number of too many digits, too
        return text
