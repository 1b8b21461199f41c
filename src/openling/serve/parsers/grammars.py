"""Grammars for replies that must call a tool, and for structured replies of models that think first."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from openling.serve.grammar import WHITE_SPACE
from openling.serve.parsers.calls_xml import KEY, KEY_END, VALUE, VALUE_END
from openling.serve.parsers.reply import THINK_END, ToolFormat
from openling.serve.parsers.tool_call import CLOSE, OPEN
from openling.serve.types import Grammar

_OBJECT = {"type": "object"}
_ANSWER_STYLE = {"whitespace_pattern": WHITE_SPACE}
# JSON in calls as templates write it.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def tool_grammar(
    format: ToolFormat, tools: Sequence[Mapping[str, Any]], *, thinks: bool, parallel: bool, special: Collection[str]
) -> Grammar:
    """Replies that are calls of `tools` (in OpenAI's form): one, or one or more if `parallel`; after thinking if `thinks`.

    special: marks that are special tokens of the tokenizer, which text does not match.
    """
    write = _json_call if format == "json" else _xml_call
    rules = [
        f"start: {'think ' if thinks else ''}call{f' ({_text(chr(10))} call)*' if parallel else ''}",
        f"call: {_mark(OPEN, special)} ({' | '.join(f'call{i}' for i in range(len(tools)))}) {_mark(CLOSE, special)}",
    ]
    for i, tool in enumerate(tools):
        rules += write(f"call{i}", tool["function"], special)
    return Grammar("lark", "\n".join([*rules, *_think(thinks, special)]) + "\n")


def after_thinking(grammar: Grammar, *, special: Collection[str]) -> Grammar:
    """The grammar of a reply to a prompt that has opened <think>: thinking, then what `grammar` says, which is of a JSON kind."""
    schema = json.loads(grammar.text) if grammar.kind == "json_schema" else _OBJECT
    answer = f"answer: {_json(schema, _ANSWER_STYLE)}"
    return Grammar("lark", "\n".join(["start: think answer", answer, *_think(True, special)]) + "\n")


def _think(thinks: bool, special: Collection[str]) -> list[str]:
    if not thinks:
        return []
    return ["think: thought gap", _text_until("thought", THINK_END, special), r"gap: /[\n]{0,2}/"]


def _json_call(rule: str, function: Mapping[str, Any], special: Collection[str]) -> Iterable[str]:
    head = '\n{"name": ' + json.dumps(function["name"]) + ', "arguments": '
    yield f"{rule}: {_text(head)} {rule}_arguments {_text('}' + chr(10))}"
    yield f"{rule}_arguments: {_json(function.get('parameters') or _OBJECT)}"


def _xml_call(rule: str, function: Mapping[str, Any], special: Collection[str]) -> Iterable[str]:
    parameters: Mapping[str, Any] = function.get("parameters") or _OBJECT
    properties, required = parameters.get("properties") or {}, parameters.get("required") or ()
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    members = [f"{rule}_{j}{'' if key in required else '?'}" for j, key in enumerate(properties)]
    yield f"{rule}: {_text(function['name'] + chr(10))} {' '.join(members)}"
    for j, (key, schema) in enumerate(properties.items()):
        begin = f"{_mark(KEY, special)} {_text(key)} {_mark(KEY_END, special)} {_text(chr(10))} {_mark(VALUE, special)}"
        yield f"{rule}_{j}: {begin} {rule}_{j}_value {_text(chr(10))}"
        yield _value(f"{rule}_{j}_value", schema, shared, special)


def _value(rule: str, schema: Any, shared: Mapping[str, Any], special: Collection[str]) -> str:
    """A value and the tag that ends it: strings are bare."""
    end = _mark(VALUE_END, special)
    if not isinstance(schema, Mapping) or schema.get("type") != "string":
        return f"{rule}: {_json({**schema, **shared} if isinstance(schema, Mapping) else schema)} {end}"
    if schema.get("enum"):
        return f"{rule}: ({' | '.join(_text(str(choice)) for choice in schema['enum'])}) {end}"
    return _text_until(rule, VALUE_END, special)


def _text_until(rule: str, tag: str, special: Collection[str]) -> str:
    """Any text up to the first `tag`, and that."""
    return f"{rule}: /(?s:.*)/ {tag}" if tag in special else f"{rule}[suffix={_text(tag)}]: /(?s:.*)/"


def _json(schema: Any, style: Mapping[str, Any] = _STYLE) -> str:
    if isinstance(schema, Mapping):
        schema = {**schema, "x-guidance": style}
    return "%json " + json.dumps(schema)


def _text(text: str) -> str:
    return json.dumps(text)


def _mark(tag: str, special: Collection[str]) -> str:
    return tag if tag in special else _text(tag)
