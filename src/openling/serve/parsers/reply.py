"""A reply taken apart as it comes: thinking, content, tool calls."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from openling.serve.parsers.calls_json import read_json_call
from openling.serve.parsers.calls_xml import read_xml_call
from openling.serve.parsers.machine import END, Delta, Found, Reads, Source, Steps, Trimmed
from openling.serve.parsers.tool_call import OPEN, ToolCall

ToolFormat = Literal["json", "xml"]
THINK, THINK_END = "<think>", "</think>"


@dataclass
class ParsedCall:
    """A whole tool call; `arguments` as the model wrote them, JSON if it did."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Parsed:
    """A whole reply."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ParsedCall] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Take a delta in."""
        self.content += delta.content
        self.reasoning += delta.reasoning
        if delta.call is not None:
            if delta.id is not None:
                self.tool_calls.append(ParsedCall(delta.id, delta.name or ""))
            self.tool_calls[delta.call].arguments += delta.arguments


class ReplyParser:
    """Feed the text of a reply in any pieces; the deltas do not depend on where it was cut. Nothing a model writes raises.

    thinking: whether <think> at the beginning opens reasoning; opened: the prompt has opened it already. tools: how calls are
    written, None to read none; schemas: JSON schema of each function's arguments. White space around thinking and between
    calls is left out. Text in <tool_call> that is no call stays content, but the beginning of a call that was cut off does not:
    from its whole name on it is a call with the arguments so far, before that it is nothing.
    """

    def __init__(
        self,
        *,
        thinking: bool = False,
        opened: bool = False,
        tools: ToolFormat | None = None,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self.parsed = Parsed()
        self._found = Found()
        self._source = Source()
        self._thinking, self._opened, self._tools, self._schemas = thinking, opened, tools, schemas or {}
        self._new_id = new_id or (lambda: f"call_{secrets.token_hex(12)}")
        self._calls = 0
        self._steps: Steps | None = self._read()
        next(self._steps)

    def feed(self, text: str) -> list[Delta]:
        """What is certain after this piece. Raises ValueError after `finish`."""
        if self._steps is None:
            raise ValueError("the reply is finished")
        for c in text:
            self._steps.send(c)
        return self._taken()

    def finish(self, *, cut: bool = False) -> list[Delta]:
        """What is left when the text ends. cut: the model was stopped in the middle of it; half a tag is then left out."""
        if self._steps is not None:
            self._source.cut = cut
            with suppress(StopIteration):
                self._steps.send(END)
            self._steps = None
        return self._taken()

    def _taken(self) -> list[Delta]:
        deltas = self._found.take()
        for delta in deltas:
            self.parsed.add(delta)
        return deltas

    def _read(self) -> Steps:
        thought = False
        if self._thinking:
            opens = yield from self._opens()  # some repeat what the prompt has opened
            thought = self._opened or opens == THINK
        if thought:
            reasoning = Trimmed(self._reasoning, lstrip=True, rstrip=True)
            if (yield from self._source.until((THINK_END,), reasoning)) == END:
                return
        content = Trimmed(self._content, lstrip=thought, rstrip=self._tools is not None)
        while (yield from self._source.until((OPEN,) if self._tools else (), content)) != END:
            yield from self._call(content)
        if not self._calls:
            content.flush()

    def _opens(self) -> Reads:
        """THINK if that comes next, white space aside; else nothing has been read."""
        held = ""
        while True:
            c = yield from self._source.next()
            held += c
            if held.lstrip() == THINK:
                return THINK
            if c == END or not THINK.startswith(held.lstrip()):
                self._source.put_back("" if c == END and self._source.cut else held)
                return END

    def _call(self, content: Trimmed) -> Steps:
        """What follows OPEN: a call, or content that only looked like one."""
        call = ToolCall(self._found, self._calls, self._new_id())
        self._source.record()
        if self._tools == "json":
            ending = yield from read_json_call(self._source, call)
        else:
            ending = yield from read_xml_call(self._source, call, self._schemas)
        read = self._source.recorded()
        if call.begun or ending == END:
            self._calls += call.begun
            content.restart()
        else:
            content(OPEN)
            self._source.put_back(read)

    def _content(self, text: str) -> None:
        if text:
            self._found.add(Delta(content=text))

    def _reasoning(self, text: str) -> None:
        if text:
            self._found.add(Delta(reasoning=text))
