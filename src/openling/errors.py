"""The errors a user meets: what, where, value, expected, nearest valid, next command.

`UserError` is a mistake in what was asked (exit code 2); `Failure` is a correct request that could not be
carried out (exit code 1). The command line prints them without a traceback; from Python they are ordinary exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OpenlingError(Exception):
    """An error with the six parts a reader needs; parts that do not apply are left out."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        value: object = None,
        expected: object = None,
        nearest: object = None,
        next: object = None,
    ) -> None:
        self.what = what
        self.parts = {"where": where, "value": value, "expected": expected, "nearest": nearest, "next": next}
        lines = [what] + [f"  {name + ':':<10}{part}" for name, part in self.parts.items() if part is not None]
        super().__init__("\n".join(lines))


class UserError(OpenlingError):
    """The request itself is wrong: a bad path, flag, config or checkpoint."""

    exit_code = 2


class Failure(OpenlingError):
    """The request was right and could not be finished."""

    exit_code = 1


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The valid choice that `word` most resembles, or None when nothing is close."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return matches[0] if matches else None
