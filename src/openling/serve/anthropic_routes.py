"""/v1/messages: the same chat in Anthropic's dialect, blocks and events included."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from openling.serve.chat import prepare, render
from openling.serve.chat_replies import ChatChoice
from openling.serve.parsers import Delta
from openling.serve.problems import from_validation
from openling.serve.protocol import ChatRequest
from openling.serve.protocol_anthropic import CountRequest, MessagesRequest, as_chat
from openling.serve.service import Call, Service, json_response
from openling.serve.sse import EventStream, event, unless_gone
from openling.serve.types import Output

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "abort": "end_turn"}


async def messages(service: Service, http: HttpRequest) -> ASGIApp:
    """Answer POST /v1/messages."""
    body = await service.read(http, MessagesRequest)
    service.check_model(body.model)
    prepared = await prepare(service, _chat_request(body))
    call = Call(service, http, "msg")
    await call.start(prepared.work, None)
    choice = prepared.choices(service)[0]
    if body.stream:
        return EventStream(
            _events(call, choice),
            close=call.aclose,
            timeouts=service.config.timeouts,
            request_id=call.request_id,
            error_event=lambda error: event(error.anthropic(call.request_id), "error"),
        )
    try:
        return json_response(await unless_gone(http.receive, _collect(call, choice)))
    finally:
        await call.aclose()


async def count_tokens(service: Service, http: HttpRequest) -> ASGIApp:
    """Answer POST /v1/messages/count_tokens."""
    body = await service.read(http, CountRequest)
    service.check_model(body.model)
    prompt = await render(service, _chat_request(body))
    return json_response({"input_tokens": len(prompt.ids)})


def _chat_request(body: CountRequest) -> ChatRequest:
    try:
        return ChatRequest.model_validate(as_chat(body))
    except ValidationError as error:
        raise from_validation(error, set(ChatRequest.model_fields)) from None


async def _collect(call: Call, choice: ChatChoice) -> dict[str, Any]:
    assert call.replies is not None
    last = Output("")
    async for _, output in call.replies:
        call.note(output)
        choice.feed(output)
        last = output
    answer = _message(call) | {"content": _blocks(choice)}
    return answer | _ending(choice) | {"usage": _usage(last)}


def _message(call: Call) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "message",
        "role": "assistant",
        "model": call.service.model_id,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _blocks(choice: ChatChoice) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if choice.reasoning:
        blocks.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
    if choice.content:
        blocks.append({"type": "text", "text": choice.content})
    for call in choice.calls:
        function = call["function"]
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": _input(function["arguments"])})
    return blocks


def _input(arguments: str) -> dict[str, Any]:
    """Arguments as an object; what the model did not finish is given as it stands."""
    try:
        found = json.loads(arguments or "{}")  # cut behind the name
    except ValueError:
        return {"_unparsed": arguments}
    return found if isinstance(found, dict) else {"_unparsed": arguments}


def _ending(choice: ChatChoice) -> dict[str, Any]:
    at_text = choice.finish_reason == "stop" and isinstance(choice.stop_reason, str)
    reason = "stop_sequence" if at_text else _STOP_REASONS.get(choice.finish_reason or "stop", "end_turn")
    return {"stop_reason": reason, "stop_sequence": choice.stop_reason if at_text else None}


def _usage(output: Output) -> dict[str, int]:
    return {
        "input_tokens": output.prompt_tokens - output.cached_tokens,
        "cache_read_input_tokens": output.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": output.completion_tokens,
    }


async def _events(call: Call, choice: ChatChoice) -> AsyncGenerator[bytes, None]:
    """message_start, blocks, message_delta, message_stop."""
    assert call.replies is not None
    blocks = _OpenBlock()
    last: Output | None = None
    async for _, output in call.replies:
        if last is None:  # not before: only the first output tells which of the prompt's tokens were cached
            yield event({"type": "message_start", "message": _message(call) | {"usage": _usage(output)}}, "message_start")
            yield event({"type": "ping"}, "ping")
        call.note(output)
        last = output
        for delta in choice.feed(output):
            for chunk in blocks.feed(delta):
                yield chunk
    assert last is not None
    for chunk in blocks.close():
        yield chunk
    yield event({"type": "message_delta", "delta": _ending(choice), "usage": _usage(last)}, "message_delta")
    yield event({"type": "message_stop"}, "message_stop")


class _OpenBlock:
    """The content block that is being streamed; another kind of delta closes it and opens the next."""

    def __init__(self) -> None:
        self._index = -1
        self._kind: str | None = None

    def feed(self, delta: Delta) -> list[bytes]:
        if delta.call is not None:
            start: dict[str, Any] = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
            chunks = self._switch(f"call {delta.call}", start)
            if delta.arguments:
                chunks.append(self._delta({"type": "input_json_delta", "partial_json": delta.arguments}))
            return chunks
        if delta.reasoning:
            chunks = self._switch("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            return [*chunks, self._delta({"type": "thinking_delta", "thinking": delta.reasoning})]
        chunks = self._switch("text", {"type": "text", "text": ""})
        return [*chunks, self._delta({"type": "text_delta", "text": delta.content})]

    def close(self) -> list[bytes]:
        if self._kind is None:
            return []
        self._kind = None
        return [event({"type": "content_block_stop", "index": self._index}, "content_block_stop")]

    def _switch(self, kind: str, start: dict[str, Any]) -> list[bytes]:
        if kind == self._kind:
            return []
        chunks = self.close()
        self._index, self._kind = self._index + 1, kind
        body = {"type": "content_block_start", "index": self._index, "content_block": start}
        return [*chunks, event(body, "content_block_start")]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event({"type": "content_block_delta", "index": self._index, "delta": delta}, "content_block_delta")
