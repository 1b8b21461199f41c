"""Completions: chunked prefill, cached decoding, the usual sampling filters.

Legend: B sequences, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openling.errors import UserError
from openling.model.cache import Cache
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.ops import sampling as ops
from openling.ops.cpu import packed_linears

# Prompt tokens per forward pass: attention scores and activations of a long prompt never exist all at once.
PREFILL_CHUNK = 512
# New tokens that repay a second copy of a CPU's weights.
PACKED_TOKENS = 32


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the likeliest. Filters that are off: top_k 0, top_p 1, min_p 0.

    Order: repetition penalty (CTRL, arXiv 1909.05858), temperature, top_k, top_p, min_p, as in transformers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1 is none"),
            "seed": (-(2**63) <= self.seed < 2**63, "a whole number of 64 bits"),
            "max_new_tokens": (self.max_new_tokens >= 0, "0 or more"),
        }
        for name, (ok, expected) in allowed.items():
            if not ok:
                raise UserError("this sampling setting has no meaning", where=name, value=getattr(self, name), expected=expected)


def generate(
    model: Ling,
    input_ids_BT: Tensor,
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    attention_mask: Tensor | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New tokens of every sequence; one that met a stop id ends with it, another has `max_new_tokens`.

    attention_mask [B, T]: 0 marks left padding of shorter prompts. on_token(row, token) is called as tokens appear.
    """
    out: list[list[int]] = [[] for _ in range(input_ids_BT.shape[0])]
    for tokens in decode(model, input_ids_BT, sampling, stop_ids=stop_ids, attention_mask=attention_mask):
        for row, token in enumerate(tokens):
            if token is not None:
                out[row].append(token)
                if on_token is not None:
                    on_token(row, token)
    return out


@torch.inference_mode()
def decode(
    model: Ling,
    input_ids_BT: Tensor,
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    attention_mask: Tensor | None = None,
) -> Iterator[list[int | None]]:
    """One list per step with the next token of every sequence, None for those that have stopped; arguments as `generate`."""
    cache = model.new_cache()
    seen = _Seen(input_ids_BT, attention_mask, model.config.vocab_size) if sampling.repetition_penalty != 1 else None
    generator = torch.Generator(input_ids_BT.device).manual_seed(sampling.seed)
    running = [True] * input_ids_BT.shape[0]
    logits_BV = prefill(model, input_ids_BT, cache, attention_mask)
    with packed_linears(model) if len(running) == 1 and sampling.max_new_tokens >= PACKED_TOKENS else nullcontext():
        for left in reversed(range(sampling.max_new_tokens)):
            if seen is not None:
                logits_BV = seen.penalise(logits_BV, sampling.repetition_penalty)
            next_B = choose(logits_BV, sampling, generator)
            if seen is not None:
                seen.add(next_B)
            tokens = next_B.tolist()
            yield [token if on else None for token, on in zip(tokens, running, strict=True)]
            running = [on and token not in stop_ids for token, on in zip(tokens, running, strict=True)]
            if left == 0 or not any(running):
                return
            logits_BV = model(next_B[:, None], cache=cache)[:, -1]


@torch.inference_mode()
def prefill(model: Ling, input_ids_BT: Tensor, cache: Cache, attention_mask: Tensor | None = None) -> Tensor:
    """Fill `cache` with the prompt, chunk by chunk; logits of its last token, [B, V]."""
    if input_ids_BT.shape[1] == 0:
        raise UserError("the prompt is empty", value="0 tokens", expected="at least one token to continue")
    for start in range(0, input_ids_BT.shape[1], PREFILL_CHUNK):
        chunk = slice(start, start + PREFILL_CHUNK)
        mask = None if attention_mask is None else attention_mask[:, chunk]
        h_BTM = model.model(input_ids_BT[:, chunk], cache=cache, attention_mask=mask)
    return model.logits(h_BTM[:, -1])


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of every sequence, [B]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probability = filter_logits(logits_BV, sampling).softmax(-1)
    return torch.multinomial(probability, 1, generator=generator)[:, 0]


def filter_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """`ops.sampling.filter_logits` with the same settings in every row."""

    def row(value: float) -> Tensor:
        return torch.tensor([value], dtype=logits_BV.dtype, device=logits_BV.device)

    return ops.filter_logits(
        logits_BV,
        temperature_B=row(sampling.temperature),
        top_k_B=torch.tensor([sampling.top_k], device=logits_BV.device),
        top_p_B=row(sampling.top_p),
        min_p_B=row(sampling.min_p),
        candidates=sampling.top_k if sampling.top_k or sampling.top_p == 1 else None,
    )


class _Seen:
    """Which tokens each sequence holds, prompt included, padding not: a boolean [B, V]."""

    def __init__(self, input_ids_BT: Tensor, attention_mask: Tensor | None, vocab_size: int) -> None:
        real = torch.ones_like(input_ids_BT) if attention_mask is None else attention_mask.to(input_ids_BT)
        count = torch.zeros(input_ids_BT.shape[0], vocab_size, dtype=input_ids_BT.dtype, device=input_ids_BT.device)
        self.seen = count.scatter_add_(1, input_ids_BT, real) > 0

    def add(self, token_B: Tensor) -> None:
        self.seen.scatter_(1, token_B[:, None], True)

    def penalise(self, logits_BV: Tensor, penalty: float) -> Tensor:
        return ops.penalise_repetition(logits_BV, self.seen, penalty)


def stop_ids(tokenizer: Any, config: ModelConfig) -> set[int]:
    """Tokens that end a completion: the config's and the tokenizer's end-of-text."""
    eos = config.eos_token_id
    found = {eos} if isinstance(eos, int) else set(eos or ())
    return found if tokenizer.eos_token_id is None else found | {tokenizer.eos_token_id}
