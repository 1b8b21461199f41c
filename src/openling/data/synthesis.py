"""Recipes that write new documents from old ones: atomic facts as questions and answers, long documents out of short ones.

The report credits the first for its gain on SimpleQA and describes neither in detail; these are the plug-in forms with an
extractor of definitions by rule (English), which needs no model. `extract=package.module.function` puts a model in its place:
it takes a text and returns `Fact`s. What is written carries the recipe's name as provenance and its documents' licences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from openling.data.order import stable_key
from openling.data.recall import recall
from openling.data.sources import Record
from openling.data.steps import Step


@dataclass(frozen=True)
class Fact:
    """One statement: `subject` `relation` `object`, and the sentence that says it."""

    subject: str
    relation: str
    object: str
    sentence: str


_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])|\n\s*\n")
_NAME = r"(?:The |An? )?[A-Z][\w'()-]*(?: (?:of|the|and|in|for|[A-Z0-9][\w'()-]*)){0,6}"
_DEFINITION = re.compile(rf"^({_NAME}) (is|was|are|were) ((?:an?|the|one of) [^.?!]{{8,200}})\.$")


def definitions(text: str) -> list[Fact]:
    """Sentences of the form "X is a Y.", by rule."""
    found = []
    for sentence in _SENTENCE.split(text):
        plain = " ".join(sentence.split())
        if (match := _DEFINITION.match(plain)) and match[1] not in ("It", "This", "That", "There", "He", "She", "These"):
            found.append(Fact(match[1], match[2], match[3], plain))
    return found


def _extractor(name: str) -> Callable[[str], list[Fact]]:
    if name == "definitions":
        return definitions
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(f"extract = {name!r} is neither definitions nor package.module.function")
    found: Callable[[str], list[Fact]] = getattr(import_module(module), function)
    return found


def _question(fact: Fact) -> str:
    verb = "Who or what" if fact.relation in ("was", "is") else "What"
    return f"{verb} {fact.relation} {fact.subject}?"


def _strategies(fact: Fact) -> list[str]:
    """The same fact asked for from several sides."""
    return [
        f"Question: {_question(fact)}\nAnswer: {fact.sentence}",
        f"Question: What {fact.relation} {fact.object}?\nAnswer: {fact.subject}.",
        f"Complete: {fact.subject} {fact.relation} ...\nAnswer: {fact.object}.",
    ]


def atomic_facts(*, extract: str = "definitions", keep: bool = True, least: int = 2) -> Step:
    """Questions and answers about every document with at least `least` facts, behind it or (keep=false) in its place."""
    find = _extractor(extract)

    def step(records: Iterator[Record]) -> Iterator[Record]:
        for record in records:
            if keep:
                yield record
            facts = find(record.text)
            if len(facts) >= least:
                pairs = [_strategies(f)[stable_key(f.subject, f.object) % 3] for f in facts]
                text = "\n\n".join(pairs)
                yield Record(f"{record.id}#facts", text, record.source, record.licence, record.language, "atomic-facts")

    return step


def long_documents(*, characters: int = 400_000, keep: bool = True, extract: str = "definitions", questions: int = 8) -> Step:
    """Numbered collections of a unit's documents, about `characters` long, with questions about facts in them at the end."""
    find = _extractor(extract)

    def step(records: Iterator[Record]) -> Iterator[Record]:
        group: list[Record] = []
        size = 0
        for record in records:
            if keep:
                yield record
            group.append(record)
            size += len(record.text)
            if size >= characters:
                yield _joined(group, find, questions)
                group, size = [], 0
        # What is left is too short to be long: it is no document of its own.

    return step


def _joined(group: list[Record], find: Callable[[str], list[Fact]], questions: int) -> Record:
    parts = [f"[{i}] {record.text.strip()}" for i, record in enumerate(group, 1)]
    facts = [(i, fact) for i, record in enumerate(group, 1) for fact in find(record.text)[:1]]
    facts.sort(key=lambda f: stable_key(f[1].subject, f[0]))
    asked = [f"Question: {_question(f)}\nAnswer: {f.sentence} [{i}]" for i, f in facts[:questions]]
    first = group[0]
    licence = " AND ".join(sorted({r.licence for r in group}))
    language = first.language if len({r.language for r in group}) == 1 else "mul"
    text = "\n\n".join([*parts, *asked])
    return Record(f"{first.id}+{len(group) - 1}#long", text, first.source, licence, language, "long-documents")


RECIPES: dict[str, Callable[..., Step]] = {"atomic-facts": atomic_facts, "long-documents": long_documents, "recall": recall}
