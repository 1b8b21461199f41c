"""Bounds that this server sets, checked before work is done, and sampling parameters as the engine takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from openling.config.serve import LimitsConfig
from openling.serve.problems import ApiError, bad
from openling.serve.protocol import SamplingFields, Tool
from openling.serve.types import Grammar, SamplingParams

_MOST_NODES = 20_000  # of a JSON schema; one of the allowed size in bytes has fewer unless it is hostile
_PARTS = ("content", "tool_calls")  # what a message holds lists in
_MOST_FIELDS = 128  # of a body; no route knows so many
COLDEST = 1e-6  # a temperature below it takes the likeliest token: logits divided by less overflow


def check_counts(body: Mapping[str, Any], limits: LimitsConfig, max_model_len: int) -> None:
    """Lengths of a body's lists, before anything looks at what is in them; raises ApiError 400."""
    if len(body) > _MOST_FIELDS:
        raise bad(f"the body has {len(body)} parameters; no route has more than {_MOST_FIELDS}", None, "unknown_parameter")
    bounds = {"messages": limits.messages, "tools": limits.tools, "stop": limits.stop, "stop_sequences": limits.stop}
    bounds |= {"logit_bias": limits.logit_bias, "stop_token_ids": limits.logit_bias}
    for name, most in bounds.items():
        value = body.get(name)
        if isinstance(value, (list, dict)) and len(value) > most:
            raise bad(f"{name} has {len(value)} entries; at most {most}", name)
    messages = body.get("messages")
    spoken = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    inner = [message.get(key) for message in spoken for key in _PARTS]
    parts = sum(len(value) for value in inner if isinstance(value, list))
    if parts > limits.parts:
        raise bad(f"messages have {parts} parts together; at most {limits.parts}", "messages")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) and len(prompt) > limits.prompts:
        raise bad(f"{len(prompt)} prompts; at most {limits.prompts}", "prompt")
    for name in ("prompt", "prompt_token_ids", "input_ids", "tokens"):
        value = body.get(name)
        if isinstance(value, list) and len(value) > max(max_model_len, limits.prompts):
            raise too_long(max_model_len, name)


def check_sampling(body: SamplingFields, limits: LimitsConfig, vocab_size: int) -> None:
    """n, stop strings, logit_bias and token ids within bounds; raises ApiError 400 naming the field and the bound."""
    if (body.n or 1) > limits.n:
        raise bad(f"n is {body.n}; at most {limits.n}", "n")
    if len(body.stop or ()) > limits.stop:
        raise bad(f"{len(body.stop or ())} stop strings; at most {limits.stop}", "stop")
    if any(len(stop) > limits.stop_characters for stop in body.stop or ()):
        raise bad(f"a stop string has more than {limits.stop_characters} characters", "stop")
    if len(body.logit_bias or ()) > limits.logit_bias:
        raise bad(f"logit_bias has {len(body.logit_bias or ())} entries; at most {limits.logit_bias}", "logit_bias")
    if len(body.stop_token_ids or ()) > limits.logit_bias:
        raise bad(f"stop_token_ids has more than {limits.logit_bias} entries", "stop_token_ids")
    check_ids(body.stop_token_ids or (), vocab_size, "stop_token_ids")


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Token ids of this vocabulary; raises ApiError 400."""
    wrong = next((id for id in ids if not 0 <= id < vocab_size), None)
    if wrong is not None:
        raise bad(f"token id {wrong} is not in the vocabulary: 0 to {vocab_size - 1}", param)


def logit_bias(given: Mapping[str, float] | None, vocab_size: int) -> dict[int, float]:
    """Bias per token id, each within OpenAI's -100 to 100; raises ApiError 400."""
    found: dict[int, float] = {}
    for key, value in (given or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 10 or int(key) >= vocab_size:
            raise bad(f"keys are token ids as strings, below {vocab_size}", "logit_bias")
        if not -100 <= value <= 100:
            raise bad("values lie between -100 and 100", "logit_bias")
        found[int(key)] = value
    return found


def check_top_logprobs(count: int | None, limits: LimitsConfig, param: str) -> None:
    """How many alternatives per token; raises ApiError 400."""
    if count is not None and count > limits.logprobs:
        raise bad(f"{count} alternatives per token; at most {limits.logprobs}", param)


def check_tools(tools: Sequence[Tool], limits: LimitsConfig) -> None:
    """Names that differ, schemas within bounds; raises ApiError 400."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad("two tools have the same name", "tools")
    for i, tool in enumerate(tools):
        if tool.function.parameters is not None:
            check_schema(tool.function.parameters, limits, f"tools[{i}].function.parameters")


def check_schema(schema: Any, limits: LimitsConfig, param: str) -> None:
    """Size, depth, regular expressions and references of a JSON schema; raises ApiError 400. Nothing is fetched, ever."""
    todo: list[tuple[Any, int]] = [(schema, 1)]
    seen = 0
    while todo:
        node, depth = todo.pop()
        seen += 1
        if depth > limits.schema_depth or seen > _MOST_NODES:
            raise bad(f"a schema may have {limits.schema_depth} levels and {_MOST_NODES} values", param)
        if isinstance(node, dict):
            _check_keywords(node, limits, param)
            todo += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, list):
            todo += [(value, depth + 1) for value in node]
    size = len(json.dumps(schema, ensure_ascii=False).encode("utf-8", "replace"))
    if size > limits.schema_bytes:
        raise bad(f"the schema has {size} bytes; at most {limits.schema_bytes}", param)


def _check_keywords(node: dict[str, Any], limits: LimitsConfig, param: str) -> None:
    reference, pattern = node.get("$ref"), node.get("pattern")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise bad("$ref may point inside the schema only (#/...)", param)
    if isinstance(pattern, str) and len(pattern) > limits.regex_characters:
        raise bad(f"a pattern has more than {limits.regex_characters} characters", param)


def tokens_to_make(asked: int | None, prompt_tokens: int, max_model_len: int, param: str) -> int:
    """How many tokens a reply may have: what was asked, or the rest of the context. Raises ApiError 400 with the numbers."""
    room = max_model_len - prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        wish = f" and asks for up to {asked} more" if asked is not None else ""
        raise bad(
            f"this model's context holds {max_model_len} tokens; the prompt has {prompt_tokens}{wish}",
            param,
            "context_length_exceeded",
        )
    return room if asked is None else asked


def too_long(max_model_len: int, param: str) -> ApiError:
    """The answer to a text that cannot fit however it is split into tokens."""
    return bad(f"the prompt is longer than the context of {max_model_len} tokens can be", param, "context_length_exceeded")


def _temperature(asked: float | None) -> float:
    if asked is None:
        return 1.0
    return asked if asked >= COLDEST else 0.0


def sampling_params(
    body: SamplingFields,
    *,
    max_tokens: int,
    vocab_size: int,
    choice: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
    routed_experts: bool = False,
) -> SamplingParams:
    """One reply's parameters. Reply `choice` of n takes its own seed, counted up from the request's."""
    top_k = body.top_k or 0
    return SamplingParams(
        temperature=_temperature(body.temperature),
        top_k=max(top_k, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=logit_bias(body.logit_bias, vocab_size),
        seed=None if body.seed is None else (body.seed + choice) % 2**63,
        max_tokens=max_tokens,
        min_tokens=min(body.min_tokens or 0, max_tokens),
        stop=tuple(body.stop or ()),
        include_stop=bool(body.include_stop_str_in_output),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
        routed_experts=routed_experts,
    )
