"""Parsers that read one character at a time, so that no split of a text can change what they find.

A parser is a generator: `c = yield from source.next()` waits for a character, `END` comes once the text is over. What it finds
goes to `Found`, which joins neighbouring pieces of one kind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

END = ""
Reads = Generator[None, str, str]
Steps = Generator[None, str, None]
Sink = Callable[[str], None]


@dataclass(frozen=True)
class Delta:
    """Something more of a reply. call: the number of the tool call that `arguments` continue; its first delta has id and name."""

    content: str = ""
    reasoning: str = ""
    call: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Found:
    """Deltas since they were last taken."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []

    def add(self, delta: Delta) -> None:
        """Append, or lengthen the last one where it is of the same kind."""
        last = self._deltas[-1] if self._deltas else None
        if last is not None and delta.id is None and last.call == delta.call and bool(last.reasoning) == bool(delta.reasoning):
            self._deltas[-1] = replace(
                last,
                content=last.content + delta.content,
                reasoning=last.reasoning + delta.reasoning,
                arguments=last.arguments + delta.arguments,
            )
        else:
            self._deltas.append(delta)

    def take(self) -> list[Delta]:
        """All of them, once."""
        deltas, self._deltas = self._deltas, []
        return deltas


class Source:
    """Characters for a parser, with a way to put some back."""

    def __init__(self) -> None:
        self._back: deque[str] = deque()
        self._record: list[str] | None = None
        self._over = False
        self.cut = False  # whether the text ends because its writer was stopped, not because it was done

    def next(self) -> Reads:
        """The next character, or END (again and again) at the end."""
        if self._back:
            c = self._back.popleft()
        else:
            c = END if self._over else (yield)
            self._over = c == END
        if self._record is not None and c != END:
            self._record.append(c)
        return c

    def put_back(self, text: str) -> None:
        """Read `text` again; a recording forgets it."""
        self._back.extendleft(reversed(list(text)))
        if self._record is not None and text:
            del self._record[-len(text) :]

    def record(self) -> None:
        """Remember what is read from here on."""
        self._record = []

    def recorded(self) -> str:
        """What was read since `record`; ends it."""
        text, self._record = "".join(self._record or ()), None
        return text

    def after_space(self) -> Reads:
        """The next character that is no white space."""
        while True:
            c = yield from self.next()
            if not c.isspace():
                return c

    def until(self, tags: Sequence[str], sink: Sink) -> Reads:
        """Pass text on until one of `tags` is complete, and return that; END where none comes. No tag begins with another.

        The beginning of a tag at the end of a text that was cut is no text.
        """
        held = ""
        while True:
            c = yield from self.next()
            if c == END:
                sink("" if self.cut else held)
                return END
            held += c
            while held and not any(tag.startswith(held) for tag in tags):
                sink(held[0])
                held = held[1:]
            if held in tags:
                return held


class Trimmed:
    """A sink that leaves out white space at its beginning if `lstrip`, and at its end if `rstrip`: held until text follows."""

    def __init__(self, sink: Sink, *, lstrip: bool, rstrip: bool) -> None:
        self._sink, self._lstrip, self._rstrip, self._held = sink, lstrip, rstrip, ""

    def __call__(self, text: str) -> None:
        """More text."""
        for c in text:
            if not c.isspace():
                self._sink(self._held + c)
                self._held, self._lstrip = "", False
            elif not self._lstrip:
                self._held += c
        if not self._rstrip:
            self.flush()

    def flush(self) -> None:
        """White space held back was the text's own."""
        self._sink(self._held)
        self._held = ""

    def restart(self) -> None:
        """Leave out what is held, and white space until text follows."""
        self._held, self._lstrip = "", True
