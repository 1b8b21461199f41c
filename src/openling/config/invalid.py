"""What pydantic refuses, told as openling tells its errors. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from openling.errors import UserError, nearest


def refusal(error: ValidationError, where: Callable[[str], object], what: str = "this setting is not valid") -> UserError:
    """The first finding. where: how a dotted name is shown, the empty one being the whole."""
    first: Mapping[str, Any] = error.errors()[0]
    value = None if isinstance(first["input"], dict) else first["input"]
    expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").replace("a valid tuple", "a list")
    place = where(".".join(map(str, first["loc"])))
    return UserError(what, where=place, value=value, expected=expected, nearest=_nearest(first))


def wrong(message: str, close: object) -> PydanticCustomError:
    """For validators: a refusal that knows the nearest settings that are valid."""
    return PydanticCustomError("setting", "{message}", {"message": message, "nearest": close})


def _nearest(finding: Mapping[str, Any]) -> object:
    kind, value, limits = finding["type"], finding["input"], finding.get("ctx", {})
    if kind == "literal_error":
        return nearest(str(value), re.findall("'([^']*)'", limits["expected"]))
    for name, step in (("ge", 0), ("le", 0), ("gt", 1), ("lt", -1)):
        if name in limits:  # next to a bound that is left out there is a nearest integer, and no nearest fraction
            return limits[name] + step if step == 0 or isinstance(limits[name], int) else None
    return limits.get("nearest")
