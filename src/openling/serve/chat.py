"""/v1/chat/completions: checked, rendered by the checkpoint's template, sampled, parsed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from openling.data.messages import checked_kwargs
from openling.errors import UserError
from openling.serve.chat_replies import ChatChoice, ChatStream, collect
from openling.serve.checks import (
    check_ids,
    check_sampling,
    check_schema,
    check_tools,
    check_top_logprobs,
    sampling_params,
    tokens_to_make,
)
from openling.serve.merged import as_api_error
from openling.serve.parsers import ReplyParser
from openling.serve.problems import bad
from openling.serve.protocol import ChatRequest, Message, NamedTool, Tool
from openling.serve.service import Call, Service, Usage, json_response
from openling.serve.sse import EventStream, event, unless_gone
from openling.serve.types import Grammar, SamplingParams


@dataclass(frozen=True)
class PreparedChat:
    """A chat request ready for the engine: one (prompt, parameters) per reply, and how to read what comes back."""

    body: ChatRequest
    prompt_ids: list[int]
    work: list[tuple[list[int], SamplingParams]]
    parser: Callable[[], ReplyParser]

    def choices(self, service: Service) -> list[ChatChoice]:
        """One empty reply per prompt."""
        one_call = self.body.parallel_tool_calls is False
        shown = self.body.include_reasoning is not False
        return [ChatChoice(service.text, self.parser(), i, one_call=one_call, reasoning=shown) for i in range(len(self.work))]


async def chat_completions(service: Service, http: HttpRequest) -> ASGIApp:
    """Answer POST /v1/chat/completions."""
    body = await service.read(http, ChatRequest)
    service.check_model(body.model)
    prepared = await prepare(service, body)
    call = Call(service, http, "chatcmpl")
    await call.start(prepared.work, body.cache_salt)
    choices, usage = prepared.choices(service), Usage(body.n or 1)
    prompt_ids = prepared.prompt_ids if body.return_token_ids else None
    if body.stream:
        options = body.stream_options
        stream = ChatStream(
            call,
            choices,
            usage,
            logprobs=bool(body.logprobs),
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            prompt_ids=prompt_ids,
        )
        return EventStream(
            stream.events(),
            close=call.aclose,
            timeouts=service.config.timeouts,
            request_id=call.request_id,
            error_event=lambda error: event(error.openai()),
        )
    try:
        work = collect(call, choices, usage, logprobs=bool(body.logprobs), prompt_ids=prompt_ids)
        return json_response(await unless_gone(http.receive, work))
    finally:
        await call.aclose()


async def prepare(service: Service, body: ChatRequest) -> PreparedChat:
    """Check, render and tokenize a request; compile its grammar. Raises ApiError 400."""
    _check(service, body)
    prompt = await render(service, body)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    max_tokens = tokens_to_make(asked, len(prompt.ids), service.max_model_len, "messages")
    grammar = await _compiled(service, body, prompt)
    work = [
        (
            prompt.ids,
            sampling_params(
                body,
                max_tokens=max_tokens,
                vocab_size=service.text.vocab_size,
                choice=choice,
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                grammar=grammar,
            ),
        )
        for choice in range(body.n or 1)
    ]
    return PreparedChat(body, prompt.ids, work, lambda: service.text.parser(prompt.text, _tools(body)))


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation."""

    text: str
    ids: list[int]


async def render(service: Service, body: ChatRequest) -> Prompt:
    """The prompt of a chat request. Raises ApiError 400."""
    if body.prompt_token_ids is not None:
        tokens_to_make(None, len(body.prompt_token_ids), service.max_model_len, "prompt_token_ids")
        check_ids(body.prompt_token_ids, service.text.vocab_size, "prompt_token_ids")
        return Prompt("", list(body.prompt_token_ids))
    messages, tools = plain_messages(body.messages or []), _tools(body)
    service.check_size(sum(len(message.get("content") or "") for message in messages), "messages")
    kwargs = template_kwargs(body)
    try:
        continued = bool(body.continue_final_message)
        text = await service.in_worker(lambda: service.text.render(messages, tools or None, kwargs, continued=continued))
        service.check_size(len(text), "messages")
        return Prompt(text, await service.in_worker(lambda: service.text.encode(text, special=False)))
    except UserError as error:
        raise as_api_error(error) from None


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as the renderer takes them."""
    return [message.model_dump(exclude_none=True) for message in messages]


def template_kwargs(body: ChatRequest) -> dict[str, Any]:
    """What the request tells the template, reasoning_effort among it. Raises ApiError 400 for what is not on the list."""
    kwargs: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort == "none":
        kwargs.setdefault("enable_thinking", False)
    elif body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
        kwargs.setdefault("enable_thinking", True)  # templates with a switch know no levels
    try:
        return checked_kwargs(kwargs)
    except UserError as error:
        raise bad(str(error.parts["where"]) + ": " + as_api_error(error).message, "chat_template_kwargs") from None


def _offered(body: ChatRequest) -> list[Tool]:
    """The tools that the model is told of: none where it must not call any, one where it must call that one."""
    if body.tool_choice == "none":
        return []
    if isinstance(body.tool_choice, NamedTool):
        return [tool for tool in body.tools or () if tool.function.name == body.tool_choice.function.name]
    return list(body.tools or ())


def _tools(body: ChatRequest) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True) for tool in _offered(body)]


def _check(service: Service, body: ChatRequest) -> None:
    """Everything that can be refused without the template and the tokenizer."""
    limits = service.config.limits
    check_sampling(body, limits, service.text.vocab_size)
    check_top_logprobs(body.top_logprobs, limits, "top_logprobs")
    check_tools(body.tools or (), limits)
    if body.response_format is not None and body.response_format.json_schema is not None:
        check_schema(body.response_format.json_schema.schema_, limits, "response_format.json_schema.schema")
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if (asked or 0) * (body.n or 1) > limits.total_tokens:
        raise bad(f"n times max_tokens is above {limits.total_tokens}", "max_tokens")


async def _compiled(service: Service, body: ChatRequest, prompt: Prompt) -> Grammar | None:
    """What the reply must match, once it is known to compile: a bad schema is refused before the engine hears of it."""
    forced = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    try:
        grammar = _grammar(service, body, prompt, forced)
        if grammar is not None:
            await asyncio.wrap_future(service.engine.engine.compiler.submit(grammar))
    except UserError as error:
        detail = error.parts["value"] or error.parts["expected"]
        message = error.what + (f": {detail}" if detail is not None else "")
        raise bad(message, "tools" if forced else "response_format", "invalid_grammar") from None
    return grammar


def _grammar(service: Service, body: ChatRequest, prompt: Prompt, forced: bool) -> Grammar | None:
    if forced:
        return service.text.call_grammar(prompt.text, _tools(body), parallel=body.parallel_tool_calls is not False)
    if body.response_format is None or body.response_format.type == "text":
        return None
    wanted = body.response_format.json_schema
    return service.text.json_grammar(prompt.text, wanted.schema_text() if wanted is not None else None)
