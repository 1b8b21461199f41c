"""/generate: token ids in, token ids out, with what reinforcement learning needs: log-probabilities, weight versions, experts.

Streams come as SGLang's do: every event is the reply so far, in the shape of the whole answer; `incremental` leaves out what an
earlier event had.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from openling.serve.checks import check_ids, check_sampling, check_top_logprobs, sampling_params, tokens_to_make
from openling.serve.problems import from_validation
from openling.serve.protocol import SamplingFields
from openling.serve.protocol_admin import GenerateRequest
from openling.serve.service import Call, Service, json_response
from openling.serve.sse import DONE, EventStream, event, unless_gone
from openling.serve.text import finite
from openling.serve.types import Output, TokenLogprob

# Of other servers' parameters these change nothing here: text is a by-product, and always without special tokens.
_OTHERS = {"max_tokens", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim"}


async def generate(service: Service, http: HttpRequest) -> ASGIApp:
    """Answer POST /generate: one object, or a list of n; or their events."""
    body = await service.read(http, GenerateRequest)
    given = body.sampling_params
    check_top_logprobs(body.top_logprobs, service.config.limits, "top_logprobs")
    try:
        fields = SamplingFields(**given.model_dump(exclude_none=True, exclude=_OTHERS))
    except ValidationError as error:  # what only the whole of them shows, e.g. an empty stop string
        raise from_validation(error, set(type(given).model_fields)) from None
    check_sampling(fields, service.config.limits, service.text.vocab_size)
    max_tokens = tokens_to_make(given.max_tokens, len(body.prompt_token_ids), service.max_model_len, "prompt_token_ids")
    check_ids(body.prompt_token_ids, service.text.vocab_size, "prompt_token_ids")
    wants_logprobs = body.return_logprob or body.top_logprobs is not None
    work = [
        (
            body.prompt_token_ids,
            sampling_params(
                fields,
                max_tokens=max_tokens,
                vocab_size=service.text.vocab_size,
                choice=choice,
                logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
                prompt_logprobs=0 if body.prompt_logprobs else None,
                routed_experts=bool(body.routed_experts),
            ),
        )
        for choice in range(given.n or 1)
    ]
    call = Call(service, http, "gen", name=body.rid)
    await call.start(work, body.cache_salt)
    replies = [_Reply(f"{body.rid or call.id}") for _ in work]
    if body.stream:
        return EventStream(
            _stream(call, replies, incremental=bool(body.incremental)),
            close=call.aclose,
            timeouts=service.config.timeouts,
            request_id=call.request_id,
            error_event=lambda error: event(error.openai()),
        )
    try:
        await unless_gone(http.receive, _collect(call, replies))
    finally:
        await call.aclose()
    answers = [reply.body(service) for reply in replies]
    return json_response(answers[0] if given.n is None else answers)


async def _stream(call: Call, replies: list[_Reply], *, incremental: bool) -> AsyncGenerator[bytes, None]:
    """An event per output, with the reply's number; `incremental`: of what the output added."""
    assert call.replies is not None
    async for index, output in call.replies:
        call.note(output)
        if incremental:
            replies[index] = _Reply(replies[index].id, start=replies[index].end)
        replies[index].add(output)
        yield event(replies[index].body(call.service) | {"index": index})
    yield DONE


async def _collect(call: Call, replies: list[_Reply]) -> None:
    assert call.replies is not None
    async for index, output in call.replies:
        call.note(output)
        replies[index].add(output)


@dataclass
class _Reply:
    """A reply as it grows, from its token number `start` on; a segment is a run of tokens made by one version of the weights."""

    id: str
    start: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    experts: list[list[list[int]]] = field(default_factory=list)
    segments: list[dict[str, Any]] = field(default_factory=list)
    last: Output = field(default_factory=lambda: Output(""))

    @property
    def end(self) -> int:
        """How many tokens the reply has so far."""
        return self.start + len(self.token_ids)

    def add(self, output: Output) -> None:
        """Take an output in."""
        if output.token_ids:
            start = self.end
            if not self.segments or self.segments[-1]["weight_version"] != output.weight_version:
                self.segments.append({"weight_version": output.weight_version, "start": start, "end": start})
            self.segments[-1]["end"] = start + len(output.token_ids)
        self.token_ids += output.token_ids
        self.text += output.text
        self.logprobs += output.logprobs or []
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.experts += output.routed_experts or []
        self.last = output

    def body(self, service: Service) -> dict[str, Any]:
        """The reply, and under `output_ids` and `meta_info` the same as SGLang's clients read it.

        `logprobs` are of the distribution that was sampled from: at the request's temperature, before top_k, top_p and min_p.
        """
        last = self.last
        counts = {
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": last.completion_tokens,
            "cached_tokens": last.cached_tokens,
        }
        found: dict[str, Any] = {"text": self.text, "token_ids": self.token_ids, "output_ids": self.token_ids}
        found |= {
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
            "segments": self.segments,
            "usage": counts,
        }
        version = self.segments[-1]["weight_version"] if self.segments else service.weight_version
        meta: dict[str, Any] = counts | {"id": self.id, "weight_version": version}
        over = last.finish_reason is not None
        meta["finish_reason"] = {"type": last.finish_reason, "matched": last.stop_reason} if over else None
        if self.logprobs:
            found["logprobs"] = [finite(entry.sampled) for entry in self.logprobs]
            found["top_logprobs"] = [[[id, finite(value)] for id, value in entry.top] for entry in self.logprobs]
            meta["output_token_logprobs"] = [[finite(entry.sampled), entry.token_id, None] for entry in self.logprobs]
        if self.prompt_logprobs is not None:
            found["prompt_logprobs"] = [None if entry is None else finite(entry.logprob) for entry in self.prompt_logprobs]
        if self.experts:
            found["routed_experts"] = self.experts
        return found | {"meta_info": meta}
