"""/v1/completions: text or token ids in, text out, log-probabilities of prompt and reply as evaluation harnesses read them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from openling.serve.checks import check_ids, check_sampling, check_top_logprobs, sampling_params, tokens_to_make
from openling.serve.problems import bad
from openling.serve.protocol import CompletionRequest
from openling.serve.service import Call, Service, Usage, json_response
from openling.serve.sse import DONE, EventStream, event, unless_gone
from openling.serve.text import ModelText, finite
from openling.serve.types import Output, SamplingParams, TokenLogprob

DEFAULT_TOKENS = 16  # OpenAI's, for this route


async def completions(service: Service, http: HttpRequest) -> ASGIApp:
    """Answer POST /v1/completions."""
    body = await service.read(http, CompletionRequest)
    service.check_model(body.model)
    check_sampling(body, service.config.limits, service.text.vocab_size)
    check_top_logprobs(body.logprobs, service.config.limits, "logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise bad("max_tokens 0 makes sense with echo only", "max_tokens")
    prompts = await _prompts(service, body)
    n = body.n or 1
    work = [(ids, _params(service, body, ids, choice)) for ids in prompts for choice in range(n)]
    call = Call(service, http, "cmpl")
    await call.start(work, body.cache_salt)
    choices = [_Choice(service.text, body, i, ids) for i, (ids, _) in enumerate(work)]
    if body.stream:
        events = _stream(call, body, choices, Usage(n))
        return EventStream(
            events,
            close=call.aclose,
            timeouts=service.config.timeouts,
            request_id=call.request_id,
            error_event=lambda error: event(error.openai()),
        )
    try:
        return json_response(await unless_gone(http.receive, _collect(call, choices, Usage(n))))
    finally:
        await call.aclose()


async def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    """Every prompt as checked token ids; raises ApiError 400."""
    many, limits = body.prompt, service.config.limits
    choices = len(many) * (body.n or 1)
    if choices > limits.choices:
        raise bad(f"{choices} replies (prompts times n); at most {limits.choices}", "n")
    if choices * (body.max_tokens or DEFAULT_TOKENS) > limits.total_tokens:
        raise bad(f"prompts times n times max_tokens is above {limits.total_tokens}", "max_tokens")
    texts = [prompt for prompt in many if isinstance(prompt, str)]
    for prompt in texts:
        service.check_size(len(prompt), "prompt")
    special = body.add_special_tokens is not False
    found = await service.in_worker(lambda: [service.text.encode(p, special=special) if isinstance(p, str) else p for p in many])
    for ids in found:
        if not ids:
            raise bad("a prompt holds at least one token", "prompt")
        tokens_to_make(None, len(ids), service.max_model_len, "prompt")  # before every id is looked at
        check_ids(ids, service.text.vocab_size, "prompt")
    return found


def _params(service: Service, body: CompletionRequest, ids: Sequence[int], choice: int) -> SamplingParams:
    """max_tokens 0 (with echo) is sent as 1, whose token is left out of the reply: the engine always makes one."""
    asked = None if body.max_tokens is None else max(body.max_tokens, 1)
    room = tokens_to_make(asked, len(ids), service.max_model_len, "prompt")
    return sampling_params(
        body,
        max_tokens=min(room, DEFAULT_TOKENS) if asked is None else asked,
        vocab_size=service.text.vocab_size,
        choice=choice,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )


@dataclass
class _Choice:
    """One reply on its way into OpenAI's shape."""

    text: ModelText
    body: CompletionRequest
    index: int
    prompt: Sequence[int]
    offset: int = 0
    before: int | None = None
    opened: bool = False
    whole: dict[str, Any] = field(default_factory=dict)

    def feed(self, output: Output) -> dict[str, Any]:
        """What an output adds: text, log-probabilities, ids, finish reason."""
        echoed, ids, entries = "", list(output.token_ids), list(output.logprobs or ())
        text = output.text
        if self.body.max_tokens == 0:
            ids, entries, text = [], [], ""
        logprobs = _empty_logprobs() if self.body.logprobs is not None else None
        first = not self.opened
        self.opened = True
        if self.body.echo and first:
            echoed = self.text.full(self.prompt) if self.body.logprobs is not None else self.text.decode(self.prompt)
            if logprobs is not None:
                known = output.prompt_logprobs or [None] * len(self.prompt)
                self._extend(logprobs, self.prompt, known)
        if logprobs is not None:
            self._extend(logprobs, ids, entries)
        piece: dict[str, Any] = {"index": self.index, "text": echoed + text, "logprobs": logprobs}
        piece["finish_reason"] = "length" if self.body.max_tokens == 0 and output.finish_reason else output.finish_reason
        piece["stop_reason"] = output.stop_reason
        if self.body.return_token_ids:
            piece["token_ids"] = ids
            piece["prompt_token_ids"] = list(self.prompt) if first else None
        return piece

    def add(self, output: Output) -> None:
        """Join an output to what came before it: the whole choice."""
        piece = self.feed(output)
        if not self.whole:
            self.whole = piece
            return
        self.whole["text"] += piece["text"]
        for name in ("finish_reason", "stop_reason"):
            self.whole[name] = piece[name]
        for name, values in (piece["logprobs"] or {}).items():
            self.whole["logprobs"][name] += values
        if self.body.return_token_ids:
            self.whole["token_ids"] += piece["token_ids"]

    def _extend(self, logprobs: dict[str, list[Any]], ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> None:
        names = []
        for id, entry in zip(ids, entries, strict=True):
            name = self.text.name(id, self.before)
            names.append(name)
            logprobs["token_logprobs"].append(None if entry is None else finite(entry.logprob))
            logprobs["top_logprobs"].append(None if entry is None else self._top(name, entry))
            self.before = id
        offsets = self.text.bytes.offsets(ids, start=self.offset)
        self.offset += len(self.text.full(ids))
        logprobs["tokens"] += names
        logprobs["text_offset"] += offsets

    def _top(self, name: str, entry: TokenLogprob) -> dict[str, float]:
        """Alternatives by name, the token itself always among them; of two with one name the likelier."""
        top: dict[str, float] = {}
        for id, logprob in entry.top:
            top.setdefault(self.text.name(id, self.before), finite(logprob))
        top.setdefault(name, finite(entry.logprob))
        return top


def _empty_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _head(call: Call) -> dict[str, Any]:
    service = call.service
    return {
        "id": call.id,
        "object": "text_completion",
        "created": call.created,
        "model": service.model_id,
        "system_fingerprint": service.weight_version,
    }


async def _collect(call: Call, choices: list[_Choice], usage: Usage) -> dict[str, Any]:
    """The whole answer."""
    assert call.replies is not None
    async for index, output in call.replies:
        call.note(output)
        usage.note(index, output)
        choices[index].add(output)
    return _head(call) | {"choices": [choice.whole for choice in choices], "usage": usage.body()}


async def _stream(call: Call, body: CompletionRequest, choices: list[_Choice], usage: Usage) -> AsyncGenerator[bytes, None]:
    """The answer as events."""
    assert call.replies is not None
    options = body.stream_options
    async for index, output in call.replies:
        call.note(output)
        usage.note(index, output)
        piece = choices[index].feed(output)
        if not (piece["text"] or piece["finish_reason"] or piece.get("token_ids") or (piece["logprobs"] or {}).get("tokens")):
            continue
        chunk = _head(call) | {"choices": [piece]}
        if options and options.continuous_usage_stats:
            chunk["usage"] = usage.body()
        elif options and options.include_usage:
            chunk["usage"] = None
        yield event(chunk)
    if options and options.include_usage:
        yield event(_head(call) | {"choices": [], "usage": usage.body()})
    yield DONE
