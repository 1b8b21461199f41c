"""What OpenAI-style clients may send, field by field. An unknown parameter is an error; those that only other services act on are
dropped (`IGNORED`). Bounds that a server may configure are checked in `checks.py`; what is wrong in itself is found here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

# Harmless wherever the reply does not depend on them: accounting, routing and storage of hosted services.
IGNORED = frozenset(
    (
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    )
)
_TOKENS = "token ids: a list of non-negative integers"


class Body(BaseModel):
    """A JSON object whose keys are all known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _plain_text(value: Any) -> Any:
    """Text parts joined to one string; other kinds of parts are refused by name."""
    if not isinstance(value, list):
        return value
    pieces = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text") or not isinstance(part.get("text"), str):
            raise ValueError(f"content parts must be {{'type': 'text', 'text': ...}}; this model reads text only, got {kind!r}")
        pieces.append(part["text"])
    return "".join(pieces)


_TEXT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}
Text = Annotated[str, BeforeValidator(_plain_text), WithJsonSchema(_TEXT_SCHEMA)]


class FunctionCall(Body):
    """A call that the model made: name and arguments (JSON text)."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str = "{}"


class ToolCall(BaseModel):
    """A tool call of an assistant message; clients send back what they were sent, with `index` and the like."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    id: str = Field("", max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One message of a conversation. Unknown keys are ignored here, for clients send back whole replies."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = Field(None, max_length=256)
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _content_or_calls(self) -> Self:
        said = self.content is not None or self.tool_calls or self.reasoning_content or self.reasoning
        if not said or (self.role != "assistant" and self.content is None):
            raise ValueError(f"a message of role '{self.role}' needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only assistant messages carry tool_calls")
        return self


class Function(Body):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool: functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A JSON schema that the reply must satisfy."""

    name: str = Field("reply", max_length=128)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    def schema_text(self) -> str:
        """The schema as JSON."""
        return json.dumps(self.schema_, ensure_ascii=False)


class ResponseFormat(Body):
    """What the reply's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_promised(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and only with it")
        return self


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


_STRING_SCHEMA = {"type": "string", "minLength": 1}
Stop = Annotated[
    list[str],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema({"anyOf": [_STRING_SCHEMA, {"type": "array", "items": _STRING_SCHEMA}]}),
]
# Keys of a JSON object are strings; these are token ids.
LogitBias = Annotated[dict[str, float], WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}})]


class SamplingFields(Body):
    """How replies are sampled and delivered: shared by both completion routes."""

    model: str | None = Field(None, max_length=512)
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if key not in IGNORED}
        return data

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        if self.stop is not None and not all(self.stop):
            raise ValueError("stop: a stop string holds at least one character")
        return self


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: list[Message] | None = Field(None, min_length=1)
    prompt_token_ids: list[int] | None = Field(None, min_length=1, description=_TOKENS + "; instead of messages")
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    reasoning_effort: Literal["none", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, str | int | float | bool] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = Field(None, description="the opposite of continue_final_message; may be left out")
    include_reasoning: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.messages is None) == (self.prompt_token_ids is None):
            raise ValueError("messages: give either messages or prompt_token_ids")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice names a function that is not among tools: {', '.join(names)}")
        if self.tool_choice not in (None, "none", "auto") and self.response_format and self.response_format.type != "text":
            raise ValueError("response_format and a forced tool_choice exclude each other")
        if self.add_generation_prompt is not None and self.add_generation_prompt == bool(self.continue_final_message):
            raise ValueError("add_generation_prompt: false goes with continue_final_message: true, and only with it")
        if self.continue_final_message:
            self._check_continued()
        return self

    def _check_continued(self) -> None:
        last = self.messages[-1] if self.messages else None
        if last is None or last.role != "assistant" or last.tool_calls:
            raise ValueError("messages: only text of the assistant can be continued, as the last message")
        if self.tool_choice not in (None, "none", "auto") or (self.response_format and self.response_format.type != "text"):
            raise ValueError("messages: a continued message cannot be held to a schema or a tool; end with another's message")


def _prompts(value: Any) -> Any:
    """One prompt or several, as a list of texts or of token lists."""
    many = [value] if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0])) else value
    if isinstance(many, list) and many:
        if all(isinstance(prompt, str) for prompt in many):
            return many
        if all(isinstance(prompt, list) and prompt and all(map(_is_id, prompt)) for prompt in many):
            return many
    raise ValueError("a prompt is a string, a list of strings, of token ids, or of lists of token ids; none of them empty")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
    ]
}
Prompts = Annotated[list[str] | list[list[int]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _not_supported(self) -> Self:
        if self.suffix:
            raise ValueError("suffix: this model does not fill in; put the text into the prompt")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: not supported; ask for n replies and choose yourself")
        return self


class TokenizeRequest(Body):
    """The body of /tokenize: a text, or messages as the chat template renders them."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: str | None = Field(None, max_length=512)
    tokens: list[Annotated[int, Field(ge=0)]]
