"""Needle in a haystack: one fact inside real text, asked for at the end (the test of G. Kamradt, 2023; numbers as in RULER,
arXiv 2404.06654). Lengths are exact in tokens of the tokenizer at hand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openling.errors import UserError

CITIES = (
    *("Lisbon", "Oslo", "Vienna", "Cairo", "Lima", "Dublin", "Prague", "Athens", "Warsaw", "Helsinki"),
    *("Bangkok", "Toronto", "Chicago", "Madrid", "Berlin", "Sydney", "Nairobi", "Boston", "Havana", "Geneva"),
)
DIGITS = 5
STATEMENT = "The secret number of {city} is"


@dataclass(frozen=True)
class Needle:
    """A prompt and the tokens that continue it rightly; the fact is tokens `fact_start` to `fact_end` of the prompt."""

    prompt: list[int]
    answer: list[int]
    fact_start: int
    fact_end: int
    city: str
    digits: str


def make_needle(tokenizer: Any, filler_ids: Sequence[int], *, length: int, depth: float, seed: int, keys: int = 1) -> Needle:
    """One case of exactly `length` tokens, answer included.

    tokenizer: a transformers tokenizer. filler_ids: tokens of real text, at least `length` of them; the seed says where it is
    cut. depth: share of the filler before the fact, 0 to 1. keys: facts in the text, the others of other cities and anywhere
    in it; at most as many as `CITIES`. Raises UserError where the text is too short for the length, or
    the length for fact and question.
    """
    draw = random.Random(f"{seed} {depth}")  # the same facts at every length, so that lengths compare
    city = draw.choice(CITIES)
    digits = "".join(str(draw.randrange(10)) for _ in range(DIGITS))
    statement = STATEMENT.format(city=city)
    fact = _encode(tokenizer, f"\n\n{statement} {digits}.\n\n")
    others = []
    for other in draw.sample([c for c in CITIES if c != city], keys - 1):
        number = "".join(str(draw.randrange(10)) for _ in range(DIGITS))
        others.append(_encode(tokenizer, f"\n\n{STATEMENT.format(city=other)} {number}.\n\n"))
    # Question and answer are encoded together and then cut: where their tokens part is up to the tokenizer.
    asked, whole = _encode(tokenizer, f"\n\n{statement}"), _encode(tokenizer, f"\n\n{statement} {digits}")
    cut = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
    question, answer = whole[:cut], whole[cut:]
    head = list(tokenizer("")["input_ids"])  # a beginning-of-text token, where the tokenizer has one
    room = length - len(head) - len(fact) - len(whole) - sum(map(len, others))
    if room < 0:
        raise UserError(
            "the length is too short for fact and question", value=length, expected=f"at least {length - room} tokens"
        )
    if len(filler_ids) < length:
        raise UserError("the filler text is too short", value=f"{len(filler_ids)} tokens", expected=f"at least {length} tokens")
    start = draw.randrange(len(filler_ids) - room + 1)
    filler, before = list(filler_ids[start : start + room]), round(depth * room)
    cuts = sorted([(draw.randrange(room + 1), other) for other in others] + [(before, fact)], key=lambda c: c[0])
    prompt, at, fact_start = list(head), 0, 0
    for place, stated in cuts:
        prompt += filler[at:place]
        at = place
        if stated is fact:
            fact_start = len(prompt)
        prompt += stated
    prompt += [*filler[at:], *question]
    return Needle(prompt, answer, fact_start, fact_start + len(fact), city, digits)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
