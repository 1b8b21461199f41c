"""Chat messages as APIs send them, made into what templates expect: text content, tool arguments as objects, known keys only.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from openling.errors import UserError, nearest

# Marks of thinking and tool calls, special tokens in some tokenizers: text and templates hold them, and parsers read them.
MARKS = frozenset(
    ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
)
ROLES = ("system", "developer", "user", "assistant", "tool")
# What a request may hand to a template besides messages and tools, and of which type.
TEMPLATE_KWARGS: dict[str, type] = {
    "enable_thinking": bool,
    "thinking": bool,
    "preserve_thinking": bool,
    "reasoning_effort": str,
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_MAX_KWARG_CHARS = 64


def normalise(messages: Sequence[Mapping[str, Any]], *, developer: bool = False) -> list[dict[str, Any]]:
    """Messages for a template. developer: whether it knows that role; else it becomes `system`.

    Content is a string (parts are joined), `reasoning` counts as `reasoning_content`, arguments of tool calls are objects where
    they are JSON objects and stay strings where they are not. Raises UserError for what is no message.
    """
    if not messages:
        raise UserError("there are no messages", expected="at least one")
    return [_message(message, f"messages[{i}]", developer) for i, message in enumerate(messages)]


def checked_kwargs(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """chat_template_kwargs that are on the list and of its type. Raises UserError for others."""
    for name, value in (kwargs or {}).items():
        where = f"chat_template_kwargs.{name}"
        if name not in TEMPLATE_KWARGS:
            raise UserError(
                "templates may not be given this",
                where=where,
                expected=", ".join(TEMPLATE_KWARGS),
                nearest=nearest(name, TEMPLATE_KWARGS),
            )
        kind = TEMPLATE_KWARGS[name]
        too_long = isinstance(value, str) and len(value) > _MAX_KWARG_CHARS
        if value is not None and (not isinstance(value, kind) or too_long):
            raise UserError("a template setting has the wrong type", where=where, value=repr(value)[:80], expected=kind.__name__)
    return {name: value for name, value in (kwargs or {}).items() if value is not None}


def text_of(content: Any, where: str) -> str:
    """Content as one string: None is empty, text parts are joined. Raises UserError for any other part."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise UserError("content is neither text nor parts", where=where, value=type(content).__name__)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise UserError("this model reads text only", where=where, value=f"a part of type {kind}", expected="type text")
        texts.append(part["text"])
    return "".join(texts)


def _message(message: Any, where: str, developer: bool) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        raise UserError("this is no role", where=where, value=role, expected=", ".join(ROLES), nearest=nearest(str(role), ROLES))
    out: dict[str, Any] = {
        "role": "system" if role == "developer" and not developer else role,
        "content": text_of(message.get("content"), where),
    }
    out |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    if role == "assistant":
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if reasoning:
            out["reasoning_content"] = text_of(reasoning, f"{where}.reasoning_content")
        if message.get("tool_calls"):
            out["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message["tool_calls"])]
    return out


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError("this is no call of a function", where=where, expected='{"function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):  # what a model wrote need not be JSON: shown to it as it was
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments or {}
    out = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return out | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})
