"""Tool calls as JSON inside <tool_call>: Ling, Qwen, Hermes.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo"}}
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Callable

from openling.serve.parsers.machine import END, Reads, Sink, Source
from openling.serve.parsers.tool_call import BAD, CLOSE, OPEN, ToolCall

_ARGUMENTS = ("arguments", "parameters")


def read_json_call(source: Source, call: ToolCall) -> Reads:
    """Read what follows <tool_call>. Returns END at the end of the text, BAD where no call has begun and none can, else "ok".

    Arguments stream as the model wrote them, control characters inside strings escaped; none are {}; a string that holds JSON is
    unwrapped. What a model breaks after a call has begun stays broken, up to the closing tag.
    """
    c = yield from source.after_space()
    if c != "{":
        return END if c == END else BAD
    ending = yield from _members(source, call)
    if ending == END:
        return END
    if not call.begun:
        return BAD
    if ending == "closed" and not call.has_arguments:
        call.arguments("{}")
    tag = yield from source.until((CLOSE, OPEN), lambda _: None)
    if tag == OPEN:  # the model forgot to close
        source.put_back(OPEN)
    return END if tag == END else "ok"


def _members(source: Source, call: ToolCall) -> Reads:
    """The members of the call's object; "closed" behind its brace, "broken" before what is no JSON."""
    while True:
        c = yield from source.after_space()
        if c == ",":
            continue
        if c == "}":
            return "closed"
        if c != '"':
            source.put_back(c)
            return END if c == END else "broken"
        key: list[str] = []
        if (yield from _string(source, key.append)) == END:
            return END
        c = yield from source.after_space()
        if c != ":":
            source.put_back(c)
            return END if c == END else "broken"
        ending = yield from _member(source, call, _unquoted("".join(key)[:-1]))
        if ending != "ok":
            return ending


def _member(source: Source, call: ToolCall, key: str) -> Reads:
    c = yield from source.after_space()
    if c == END:
        return END
    if key == "name" and c == '"':
        name: list[str] = []
        if (yield from _string(source, name.append)) == END:
            return END
        call.begin(_unquoted("".join(name)[:-1]))
        return "ok"
    if key not in _ARGUMENTS or call.has_arguments:
        return (yield from _value(source, c, lambda _: None))
    call.has_arguments = True
    if c == "{":
        return (yield from _value(source, c, call.arguments))
    whole: list[str] = []
    ending = yield from _value(source, c, whole.append)
    text = "".join(whole)
    if c == '"' and ending != "broken":
        text = _unquoted(text[1:-1] if ending == "ok" else text[1:])
    call.arguments("{}" if text in ("", "null") else text)
    return ending


def _value(source: Source, c: str, sink: Sink) -> Reads:
    """One JSON value whose first character is c; "broken" before a "<" outside strings, which JSON never has."""
    if c == '"':
        sink(c)
        return (yield from _string(source, sink))
    depth = 0
    while True:
        if c == END:
            return END
        if c == "<" or (depth == 0 and (c in ",}]" or c.isspace())):
            source.put_back(c)
            return "broken" if c == "<" else "ok"
        sink(c)
        if c == '"':
            if (yield from _string(source, sink)) == END:
                return END
        elif c in "{[":
            depth += 1
        elif c in "}]":
            depth -= 1
            if depth == 0:
                return "ok"
        c = yield from source.next()


def _string(source: Source, sink: Callable[[str], None]) -> Reads:
    """The rest of a string, its closing quote included."""
    while True:
        c = yield from source.next()
        if c == END:
            return END
        if c == "\\":
            escaped = yield from source.next()
            if escaped == END:
                return END
            sink(c + escaped)
            continue
        sink(json.dumps(c)[1:-1] if c < " " else c)
        if c == '"':
            return "ok"


def _unquoted(text: str) -> str:
    """The text that a JSON string without its quotes stands for; as it is where it stands for none."""
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:
        return text
