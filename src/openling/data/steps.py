"""Steps between reading and tokenising: each takes the records of a unit and gives those that go on, and says what it did.

A step is a callable `records -> records` and depends on nothing but these records, so that a unit that is built again gives
the same shard. Its `removed` counts documents by reason. Named ones are in `defects.FILTERS` and
`synthesis.RECIPES`; a dotted name (`my_package.module.function`) is imported, called with the options of its spec, and must
return a step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol

from openling.data.sources import Record
from openling.errors import UserError, nearest


class Step(Protocol):
    """Records of one unit in, records out."""

    def __call__(self, records: Iterator[Record]) -> Iterator[Record]:
        """The records that go on, and new ones."""
        ...


class Filter:
    """A step that keeps the documents to which `defect` answers None; the answer otherwise is the reason that is counted."""

    def __init__(self, defect: Callable[[str], str | None]) -> None:
        self.defect = defect
        self.removed: Counter[str] = Counter()

    def __call__(self, records: Iterator[Record]) -> Iterator[Record]:
        """The sound ones."""
        for record in records:
            reason = self.defect(record.text)
            if reason is None:
                yield record
            else:
                self.removed[reason] += 1


def make_step(spec: str, known: Mapping[str, Callable[..., Step]]) -> Step:
    """The step of `name` or `name:option=value,...`; a `UserError` where there is none or the options do not fit."""
    name, _, text = spec.partition(":")
    make = known.get(name)
    if make is None and "." in name:
        module, _, function = name.rpartition(".")
        try:
            make = getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UserError("the step cannot be imported", value=name, expected="package.module.function") from error
    if make is None:
        expected = ", ".join([*known, "or package.module.function"])
        raise UserError("there is no such step", value=name, expected=expected, nearest=nearest(name, known))
    try:
        return make(**_options(text))
    except (TypeError, ValueError) as error:
        raise UserError("the step's options do not fit", where=spec, value=error, expected=f"{name}:option=value") from error


def _options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in text.split(",") if text else []:
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} is no option=value")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def counted(step: Step, records: Iterator[Record], counts: dict[str, int]) -> Iterator[Record]:
    """The step's records, with documents and characters before and after it, and its reasons, added to `counts`."""

    def count(records: Iterator[Record], when: str) -> Iterator[Record]:
        for record in records:
            counts[f"documents {when}"] = counts.get(f"documents {when}", 0) + 1
            counts[f"characters {when}"] = counts.get(f"characters {when}", 0) + len(record.text)
            yield record

    yield from count(step(count(records, "in")), "out")
    for reason, number in getattr(step, "removed", {}).items():
        counts[reason] = counts.get(reason, 0) + number
