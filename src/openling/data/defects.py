"""Filters for the defects that the report names in long documents: self-repetition and structural collapse.

The report (arXiv 2606.15079, pages 7-9) names them and gives no rules; rules and thresholds are ours, every one is an option.
Its third, hallucination over long range, takes a model to judge: write a step that asks one (`steps.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from openling.data.dedup import WORD
from openling.data.steps import Filter, Step


def self_repetition(*, share: float = 0.3, ngram: int = 10, window: int = 400, window_share: float = 0.8) -> Filter:
    """Documents of which too much was said before in the same document, in all or within one stretch.

    share: most of the words that may stand in an n-gram seen earlier. window_share: the same within any `window` words, which
    finds a text that ends in a loop.
    """

    def defect(text: str) -> str | None:
        words = WORD.findall(text.lower())
        seen: set[tuple[str, ...]] = set()
        repeated = bytearray(len(words))
        for i in range(len(words) - ngram + 1):
            gram = tuple(words[i : i + ngram])
            if gram in seen:
                repeated[i : i + ngram] = b"\1" * ngram
            seen.add(gram)
        if sum(repeated) > share * len(words):
            return "repeats itself"
        inside = sum(repeated[:window])
        for i in range(window, len(words)):
            if inside > window_share * window:
                return "repeats itself in one stretch"
            inside += repeated[i] - repeated[i - window]
        return "repeats itself in one stretch" if len(words) >= window and inside > window_share * window else None

    return Filter(defect)


def structure(*, run: int = 200, line: int = 50_000, letters: float = 0.25, damaged: float = 0.001) -> Filter:
    """Documents that have lost their form.

    run: longest run of one character that is no space. line: longest line, in characters. letters: smallest share of letters
    and digits among characters that are no space, of texts of 200 and more. damaged: largest share of U+FFFD.
    """
    same = re.compile(rf"(\S)\1{{{run},}}")
    fence = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)

    def defect(text: str) -> str | None:
        if same.search(text):
            return "one character without end"
        if max(map(len, text.splitlines()), default=0) > line:
            return "a line without end"
        if len(fence.findall(text)) % 2:
            return "a code block is left open"
        if text.count("�") > damaged * len(text):
            return "characters are lost"
        dense = "".join(text.split())
        if len(dense) >= 200 and sum(map(str.isalnum, dense)) < letters * len(dense):
            return "hardly any words"
        return None

    return Filter(defect)


FILTERS: dict[str, Callable[..., Step]] = {"self-repetition": self_repetition, "structure": structure}
