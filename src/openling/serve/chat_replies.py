"""Chat replies in OpenAI's shape: whole, or as the events of a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from openling.serve.parsers import Delta, ReplyParser
from openling.serve.service import Call, Usage
from openling.serve.sse import DONE, event
from openling.serve.text import ModelText, finite
from openling.serve.types import Output, TokenLogprob


class ChatChoice:
    """One reply on its way from engine outputs to content, reasoning and tool calls."""

    def __init__(self, text: ModelText, parser: ReplyParser, index: int, *, one_call: bool, reasoning: bool) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.content, self.reasoning = "", ""
        self.calls: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.logprobs: list[dict[str, Any]] = []
        self._text, self._parser = text, parser
        self._one_call, self._show_reasoning = one_call, reasoning
        self._before: int | None = None

    def feed(self, output: Output) -> list[Delta]:
        """What an output adds, in order; it is also added to the whole."""
        found = self._parser.feed(output.text) if output.text else []
        if output.finish_reason is not None:
            found = [*found, *self._parser.finish(cut=output.finish_reason != "stop")]
        deltas = [delta for delta in found if self._wanted(delta)]
        for delta in deltas:
            self._add(delta)
        self.token_ids += output.token_ids
        if output.finish_reason is not None:
            ended = output.finish_reason
            self.finish_reason = "tool_calls" if self.calls and ended == "stop" else ended
            self.stop_reason = output.stop_reason
        return deltas

    def take_logprobs(self, output: Output) -> list[dict[str, Any]]:
        """An output's log-probabilities in OpenAI's shape."""
        entries = [self._logprob(entry) for entry in output.logprobs or ()]
        self.logprobs += entries
        return entries

    def _wanted(self, delta: Delta) -> bool:
        if self._one_call and (delta.call or 0) > 0:
            return False
        return self._show_reasoning or not delta.reasoning

    def _add(self, delta: Delta) -> None:
        self.content += delta.content
        self.reasoning += delta.reasoning
        if delta.call is None:
            return
        if delta.name is not None:
            self.calls.append({"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}})
        self.calls[delta.call]["function"]["arguments"] += delta.arguments

    def _logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        found = self._token(entry.token_id, entry.logprob)
        found["top_logprobs"] = [self._token(id, logprob) for id, logprob in entry.top]
        self._before = entry.token_id
        return found

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        raw = self._text.bytes.full(id, after=self._before)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}

    def message(self) -> dict[str, Any]:
        """The whole reply."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.calls else ""), "refusal": None}
        if self.reasoning:
            message |= {"reasoning_content": self.reasoning, "reasoning": self.reasoning}
        if self.calls:
            message["tool_calls"] = self.calls
        return message


def head(call: Call, kind: str) -> dict[str, Any]:
    """What every answer and every chunk begins with."""
    service = call.service
    return {
        "id": call.id,
        "object": kind,
        "created": call.created,
        "model": service.model_id,
        "system_fingerprint": service.weight_version,
    }


async def collect(
    call: Call, choices: Sequence[ChatChoice], usage: Usage, *, logprobs: bool, prompt_ids: list[int] | None
) -> dict[str, Any]:
    """The whole answer. prompt_ids: given where the client asked for token ids."""
    assert call.replies is not None
    async for index, output in call.replies:
        call.note(output)
        usage.note(index, output)
        choices[index].feed(output)
        if logprobs:
            choices[index].take_logprobs(output)
    answer = head(call, "chat.completion")
    answer["choices"] = [_choice(choice, logprobs, prompt_ids is not None) for choice in choices]
    answer["usage"] = usage.body()
    if prompt_ids is not None:
        answer["prompt_token_ids"] = prompt_ids
    return answer


def _choice(choice: ChatChoice, logprobs: bool, ids: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"index": choice.index, "message": choice.message(), "finish_reason": choice.finish_reason}
    found["stop_reason"] = choice.stop_reason
    found["logprobs"] = {"content": choice.logprobs, "refusal": None} if logprobs else None
    if ids:
        found["token_ids"] = choice.token_ids
    return found


class ChatStream:
    """The events of one call: role, deltas, finish, usage, [DONE]."""

    def __init__(
        self,
        call: Call,
        choices: Sequence[ChatChoice],
        usage: Usage,
        *,
        logprobs: bool,
        include_usage: bool,
        continuous_usage: bool,
        prompt_ids: list[int] | None,
    ) -> None:
        self._call, self._choices, self._usage = call, choices, usage
        self._logprobs, self._include_usage, self._continuous = logprobs, include_usage, continuous_usage
        self._prompt_ids = prompt_ids

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Every event in order."""
        call = self._call
        assert call.replies is not None
        for choice in self._choices:
            first = {"prompt_token_ids": self._prompt_ids} if self._prompt_ids is not None else {}
            yield self._chunk(choice, {"role": "assistant", "content": ""}, **first)
        async for index, output in call.replies:
            call.note(output)
            self._usage.note(index, output)
            for chunk in self._output(self._choices[index], output):
                yield chunk
        if self._include_usage:
            yield event(head(call, "chat.completion.chunk") | {"choices": [], "usage": self._usage.body()})
        yield DONE

    def _output(self, choice: ChatChoice, output: Output) -> list[bytes]:
        """The chunks of one output. Log-probabilities and ids go with its first, which may show no text yet."""
        bodies = [_delta_body(delta) for delta in choice.feed(output)]
        extra: dict[str, Any] = {}
        if self._logprobs and output.logprobs:
            extra["logprobs"] = {"content": choice.take_logprobs(output), "refusal": None}
        if self._prompt_ids is not None and output.token_ids:
            extra["token_ids"] = output.token_ids
        if extra and not bodies:
            bodies = [{"content": ""}]
        chunks = []
        for body in bodies:
            chunks.append(self._chunk(choice, body, **extra))
            extra = {}
        if choice.finish_reason is not None:
            chunks.append(self._chunk(choice, {}, finish_reason=choice.finish_reason, stop_reason=choice.stop_reason))
        return chunks

    def _chunk(self, choice: ChatChoice, delta: dict[str, Any], **extra: Any) -> bytes:
        prompt_ids = extra.pop("prompt_token_ids", None)
        entry = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None} | extra
        chunk = head(self._call, "chat.completion.chunk") | {"choices": [entry]}
        if prompt_ids is not None:
            chunk["prompt_token_ids"] = prompt_ids
        if self._continuous:
            chunk["usage"] = self._usage.body()
        elif self._include_usage:
            chunk["usage"] = None
        return event(chunk)


def _delta_body(delta: Delta) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if delta.content:
        body["content"] = delta.content
    if delta.reasoning:
        body |= {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
    if delta.call is not None:
        function: dict[str, Any] = {"arguments": delta.arguments}
        call: dict[str, Any] = {"index": delta.call, "function": function}
        if delta.name is not None:
            call |= {"id": delta.id, "type": "function"}
            function["name"] = delta.name
        body["tool_calls"] = [call]
    return body
