"""A recipe that makes text worth remembering: facts between its words, stated again further on, where they can only be recalled.

A model that learns from such text learns to look things up in its context, which ordinary text asks for too rarely to show what a
conversion costs. The second statement is question and answer in one: up to the value it is what was said before. One kind of fact
reads as `needle.make_needle` asks, with other numbers than any evaluation's: those are drawn from other seeds. Lists of words,
close together, are what looking up is learned from first: a word follows from the one before it, a digit needs the whole name.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace

from openling.data.needle import CITIES, DIGITS, STATEMENT
from openling.data.sources import Record
from openling.data.steps import Step

PROVENANCE = "recall"
# Characters between facts, drawn anew for every stretch of text: from lists of facts to one among paragraphs.
GAPS = (4, 1500)
STRETCH = 4000
# Behind this many characters a fact is no longer asked for: most training windows would not hold it.
REACH = 4000
NEW = 0.3
LISTED = (4, 16)
_WORD = re.compile(r"\b[A-Za-z]{4,10}\b")
_SPACE = re.compile(r"\s")


def recall(*, share: float = 0.5, seed: int = 0) -> Step:
    """Facts in `share` of the documents, in place of these; the others go on as they are."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")

    def step(records: Iterator[Record]) -> Iterator[Record]:
        for record in records:
            draw = random.Random(f"recall {seed} {record.source} {record.id}")
            if draw.random() < share:
                record = replace(record, id=f"{record.id}#recall", text=woven(record.text, draw), provenance=PROVENANCE)
            yield record

    return step


def woven(text: str, draw: random.Random) -> str:
    """`text` with facts between its words, new ones and ones that were stated within `REACH` characters."""
    words = sorted(set(_WORD.findall(text))) or list(CITIES)
    said: dict[str, tuple[str, int]] = {}  # statement: its value, where it was stated last
    parts: list[str] = []
    at = length = stretch = 0
    kind, gap = "", 0.0
    while at < len(text):
        if length >= stretch:
            stretch = length + STRETCH
            kind, gap = draw.choice(("needle", "book", "list")), GAPS[0] * (GAPS[1] / GAPS[0]) ** draw.random()
            gap = GAPS[0] if kind == "list" else gap
        space = _SPACE.search(text, at + 1 + round(draw.expovariate(1 / gap)))
        end = space.start() if space else len(text)
        said = {statement: (value, place) for statement, (value, place) in said.items() if length - place < REACH}
        statement, value = _fact(kind, words, draw)
        if said and draw.random() >= NEW:
            statement = list(said)[-int(len(said) ** draw.random())]  # at any distance, and most often at a small one
        value = said.pop(statement, (value, 0))[0]
        said[statement] = value, length
        parts += [text[at:end], f"\n\n{statement} {value}\n\n"]
        length += len(parts[-2]) + len(parts[-1])
        at = end
    return "".join(parts)


def _fact(kind: str, words: list[str], draw: random.Random) -> tuple[str, str]:
    """(what is said up to the value, the value)."""
    digits = "".join(str(draw.randrange(10)) for _ in range(DIGITS))
    if kind == "needle":
        return STATEMENT.format(city=draw.choice(CITIES)), f"{digits}."
    name = f"{draw.choice(words)} {draw.choice(words)}:"
    return name, digits if kind == "book" else " ".join(draw.choices(words, k=draw.randint(*LISTED)))
