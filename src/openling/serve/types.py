"""What goes into the engine and what comes out: requests, sampling parameters, outputs. Tokens are truth, text is derived.

Imports no torch, so that the server's protocol and its clients can use it cheaply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# "abort": the client left or an administrator stopped it; "error": `Output.error` says what went wrong with this request.
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Grammar:
    """What the text of a reply must match; compiled outside the engine's thread."""

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str = ""


@dataclass(frozen=True)
class SamplingParams:
    """How one reply is chosen and when it ends. Filters that are off: top_k 0, top_p 1, min_p 0.

    Order: logit_bias, repetition (prompt and reply), presence and frequency penalties (reply), grammar, temperature, top_k,
    top_p, min_p. temperature 0 takes the likeliest token. With a seed the reply is a function of prompt, parameters and weights:
    the random number of a position is keyed by (seed, position), whatever the batch.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    routed_experts: bool = False


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it. Requests share cached prefixes only within one `namespace`."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    namespace: str = ""


@dataclass(frozen=True)
class TokenLogprob:
    """log p of a token, FP32, natural logarithm; `top` holds the likeliest (id, logprob), likeliest first.

    `logprob` is of the distribution before temperature and filters (what APIs report); `sampled` of the one that was sampled from
    at the request's temperature, before top_k, top_p and min_p (what RL trains on).
    """

    token_id: int
    logprob: float
    sampled: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Output:
    """What one engine step made for one request. Text is held back while it may still be part of a stop string or a character.

    `prompt_logprobs` comes with the first output: one entry per prompt token, None for the first. `routed_experts` has one
    [layer][k] per token of the context whose experts were computed in this step. `weight_version` made these tokens.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    routed_experts: list[list[list[int]]] | None = None
    weight_version: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass
class EngineStats:
    """A snapshot for /metrics and the idle integrity check; sums count since the start."""

    running: int = 0
    waiting: int = 0
    paused: int = 0
    slots_total: int = 0
    slots_free: int = 0
    pages_total: int = 0
    pages_free: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    schedule_seconds: float = 0.0
    weight_version: str = ""
