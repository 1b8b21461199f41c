"""How a checkpoint writes thinking and tool calls: read off its chat template, unless a name says otherwise."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openling.errors import UserError, nearest
from openling.serve.parsers.grammars import after_thinking, tool_grammar
from openling.serve.parsers.reply import THINK, THINK_END, ReplyParser, ToolFormat
from openling.serve.parsers.tool_call import OPEN
from openling.serve.types import Grammar

TOOL_PARSERS: dict[str, ToolFormat | None] = {
    "ling": "json",
    "qwen": "json",
    "hermes": "json",
    "ring": "xml",
    "glm": "xml",
    "none": None,
}
REASONING_PARSERS = {"think": True, "none": False}


@dataclass(frozen=True)
class ReplyFormat:
    """tools: how calls are written, None where the model knows none; thinking: whether it thinks in <think>."""

    tools: ToolFormat | None
    thinking: bool

    def parser(self, prompt: str, tools: Sequence[Mapping[str, Any]] = ()) -> ReplyParser:
        """A parser for the reply to a rendered prompt. tools: the request's, in OpenAI's form; without any, none are read."""
        return ReplyParser(
            thinking=self.thinking,
            opened=opens_thinking(prompt),
            tools=self.tools if tools else None,
            schemas={function["name"]: _parameters(function) for function in map(function_of, tools)},
        )

    def tool_grammar(
        self, prompt: str, tools: Sequence[Mapping[str, Any]], *, parallel: bool, special: Collection[str]
    ) -> Grammar:
        """What the reply to a prompt must be where it must call one of `tools`, or several if `parallel`.

        special: the tokenizer's special tokens. Raises UserError where the model knows no tools.
        """
        if self.tools is None:
            raise UserError("this model has no format for tool calls", next="--tool-parser names one")
        return tool_grammar(self.tools, tools, thinks=self._thinks(prompt), parallel=parallel, special=special)

    def answer_grammar(self, prompt: str, grammar: Grammar, *, special: Collection[str]) -> Grammar:
        """`grammar` for the reply to a prompt: a JSON kind begins after the thinking that the prompt has opened, if any."""
        if not self._thinks(prompt) or grammar.kind not in ("json_schema", "json_object"):
            return grammar
        return after_thinking(grammar, special=special)

    def _thinks(self, prompt: str) -> bool:
        return self.thinking and opens_thinking(prompt)


def choose(template: str | None, *, tool_parser: str = "auto", reasoning_parser: str = "auto") -> ReplyFormat:
    """The format of a checkpoint with this chat template. Raises UserError for a parser's name that there is not."""
    source = template or ""
    tools: ToolFormat | None = "xml" if "<arg_key>" in source else "json" if OPEN in source else None
    thinking = THINK in source or THINK_END in source
    if tool_parser != "auto":
        tools = TOOL_PARSERS[_known(tool_parser, TOOL_PARSERS, "tool_parser")]
    if reasoning_parser != "auto":
        thinking = REASONING_PARSERS[_known(reasoning_parser, REASONING_PARSERS, "reasoning_parser")]
    return ReplyFormat(tools, thinking)


def opens_thinking(prompt: str) -> bool:
    """Whether the prompt ends inside <think>, so that the reply begins there."""
    return prompt.rstrip().endswith(THINK)


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a tool in OpenAI's form."""
    function: Mapping[str, Any] = tool["function"]
    return function


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    return parameters if isinstance(parameters, Mapping) else {}


def _known(name: str, names: Mapping[str, Any], where: str) -> str:
    if name not in names:
        raise UserError(
            "there is no such parser",
            where=where,
            value=name,
            expected=", ".join(("auto", *names)),
            nearest=nearest(name, names),
        )
    return name
