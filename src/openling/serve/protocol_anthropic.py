"""What clients of Anthropic's dialect send to /v1/messages, and the same request in OpenAI's terms."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from openling.serve.protocol import Body

# Accounting, betas and storage of the hosted service: the reply does not depend on them here.
IGNORED = frozenset(("metadata", "service_tier", "container", "context_management", "betas", "inference_geo", "cache_control"))


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class TextBlock(_Part):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(_Part):
    """What the model thought, sent back."""

    type: Literal["thinking"]
    thinking: str


class HiddenThinkingBlock(_Part):
    """Encrypted thinking of another service: left out."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(_Part):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str = Field(max_length=256)
    name: str = Field(min_length=1, max_length=256)
    input: dict[str, Any]


class ToolResultBlock(_Part):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(max_length=256)
    content: str | list[TextBlock] = ""
    is_error: bool | None = None


Block = Annotated[TextBlock | ThinkingBlock | HiddenThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]
# Text becomes a block first: of a union with `str`, errors would speak of the branch that was not meant.
Blocks = Annotated[
    list[Block],
    BeforeValidator(
        lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value,
        json_schema_input_type=str | list[Block],
    ),
]


class AnthropicMessage(_Part):
    """One message: text or blocks."""

    role: Literal["user", "assistant"]
    content: Blocks


class AnthropicTool(_Part):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None


class AnthropicToolChoice(Body):
    """Which tools must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name goes with type 'tool', and only with it")
        return self


class Thinking(Body):
    """Whether the model thinks first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: str | None = None


class OutputFormat(Body):
    """A JSON schema that the reply must satisfy."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """What the reply's text must be."""

    format: OutputFormat | None = None


class CountRequest(Body):
    """The body of /v1/messages/count_tokens."""

    model: str = Field(max_length=512)
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if key not in IGNORED}
        return data

    @model_validator(mode="after")
    def _ends_in_text(self) -> Self:
        """A last message of the assistant is continued: what the hosted service asks of it."""
        last = self.messages[-1]
        if last.role == "assistant" and last.content:
            block = last.content[-1]
            if isinstance(block, ToolUseBlock):
                raise ValueError("messages: the last one uses a tool, whose tool_result must follow")
            if isinstance(block, TextBlock) and block.text.strip() and block.text != block.text.rstrip():
                raise ValueError("messages: the last one is continued, so that it cannot end with white space")
        return self


class MessagesRequest(CountRequest):
    """The body of /v1/messages."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)


def as_chat(body: CountRequest) -> dict[str, Any]:
    """The request as the body of /v1/chat/completions; absent fields stay absent."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _joined(body.system)})
    for message in body.messages:
        messages += _messages(message)
    chat: dict[str, Any] = {"messages": messages}
    if body.messages[-1].role == "assistant":
        if messages[-1]["content"].strip() or "reasoning_content" in messages[-1]:
            chat["continue_final_message"] = True
        else:
            messages.pop()  # nothing to continue
    if body.tools:
        chat["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        choice = body.tool_choice
        named = {"type": "function", "function": {"name": choice.name}}
        chat["tool_choice"] = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
        if choice.disable_parallel_tool_use is not None:
            chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if body.thinking is not None and body.thinking.type != "adaptive":
        chat["chat_template_kwargs"] = {"enable_thinking": body.thinking.type == "enabled"}
    if body.output_config is not None and body.output_config.format is not None:
        chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": body.output_config.format.schema_}}
    if isinstance(body, MessagesRequest):
        chat["max_tokens"] = body.max_tokens
        same = {"stop": body.stop_sequences, "temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
        chat |= {name: value for name, value in same.items() if value is not None}
    return chat


def _joined(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _messages(message: AnthropicMessage) -> list[dict[str, Any]]:
    """One message in OpenAI's terms; a user's tool results become messages of their own, before the user's words."""
    found: list[dict[str, Any]] = []
    text: list[str] = []
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in message.content:
        match block:
            case TextBlock():
                text.append(block.text)
            case ThinkingBlock():
                thinking.append(block.thinking)
            case ToolUseBlock():
                function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock():
                found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _joined(block.content)})
    own: dict[str, Any] = {"role": message.role, "content": "\n".join(text)}
    if thinking:
        own["reasoning_content"] = "\n".join(thinking)
    if calls:
        own["tool_calls"] = calls
    if text or thinking or calls or not found:
        found.append(own)
    return found
