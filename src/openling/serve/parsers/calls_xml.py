"""Tool calls as keys and values inside <tool_call>: Ring, GLM.

<tool_call>get_weather
<arg_key>city</arg_key>
<arg_value>Oslo</arg_value>
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from openling.serve.parsers.machine import END, Reads, Source
from openling.serve.parsers.tool_call import BAD, CLOSE, OPEN, ToolCall, is_name

KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_LONGEST_NAME = 256


def read_xml_call(source: Source, call: ToolCall, schemas: Mapping[str, Mapping[str, Any]]) -> Reads:
    """Read what follows <tool_call>; returns as `read_json_call` does.

    schemas: JSON schema of each function's arguments. A value whose schema is a string is text and streams; any other is JSON,
    and text where it is none, and comes when it is whole.
    """
    name = yield from _name(source)
    if name in (END, BAD):
        return name
    junk: list[str] = []
    tag = yield from source.until((KEY, CLOSE, OPEN), junk.append)
    if tag == END and not source.cut:
        return END
    if "".join(junk).strip():
        return END if tag == END else BAD
    call.begin(name)
    properties = schemas.get(name, {}).get("properties", {})
    while tag == KEY:
        key: list[str] = []
        if (yield from source.until((KEY_END,), key.append)) == END:
            return END
        tag = yield from source.until((VALUE, KEY, CLOSE, OPEN), lambda _: None)
        if tag == VALUE:
            if (yield from _argument(source, call, "".join(key).strip(), properties)) == END:
                return END
            tag = yield from source.until((KEY, CLOSE, OPEN), lambda _: None)
    if tag == END:
        return END
    call.arguments("}" if call.has_arguments else "{}")
    if tag == OPEN:  # the model forgot to close
        source.put_back(OPEN)
    return "ok"


def _name(source: Source) -> Reads:
    name = ""
    c = yield from source.after_space()
    while c not in ("\n", "<", END):
        name += c
        if len(name) > _LONGEST_NAME:
            return BAD
        c = yield from source.next()
    source.put_back(c)
    name = name.strip()
    return END if c == END else name if is_name(name) else BAD


def _argument(source: Source, call: ToolCall, key: str, properties: Any) -> Reads:
    """One value, as a member of the arguments' object."""
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    call.arguments((", " if call.has_arguments else "{") + _quoted(key) + ": ")
    call.has_arguments = True
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        call.arguments('"')
        tag = yield from source.until((VALUE_END,), lambda text: call.arguments(_quoted(text)[1:-1]))
        call.arguments('"' if tag != END else "")
        return tag
    value: list[str] = []
    tag = yield from source.until((VALUE_END,), value.append)
    if tag != END:
        call.arguments(_json_or_text("".join(value)))
    return tag


def _json_or_text(text: str) -> str:
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _quoted(text)
    return text.strip()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
