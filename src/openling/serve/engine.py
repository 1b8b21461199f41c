"""The engine: requests go in, every `step` computes one batch, and what became new comes out.

A step: the scheduler picks work and memory, the runner computes it, the sampler draws tokens, and what is certain is committed:
tokens, text, cached prefixes. Between steps everything is consistent: requests may be added and aborted, weights exchanged.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import torch

from openling.errors import UserError
from openling.model.generate import stop_ids
from openling.model.ling import Ling
from openling.serve.detokenize import TokenBytes
from openling.serve.engine_config import EngineConfig
from openling.serve.memory import make_store
from openling.serve.replies import Reply
from openling.serve.runner import Forward, Runner
from openling.serve.sampling import Chain, Sampler
from openling.serve.scheduler import Plan, Scheduler
from openling.serve.sequence import Sequence
from openling.serve.types import EngineStats, Output, Request


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread owns it (see `AsyncEngine`)."""

    def __init__(self, model: Ling, tokenizer: Any, config: EngineConfig | None = None) -> None:
        """tokenizer: a fast transformers tokenizer, or None (no text, no stop strings; ends at the config's stop tokens)."""
        self.config = config or EngineConfig()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_model_len, store = make_store(model, self.config)
        self.scheduler = Scheduler(self.config, store, self.max_model_len)
        self.runner = Runner(model, store)
        self.eos_ids = _eos_ids(model, tokenizer)
        self.sampler = Sampler(model.config.vocab_size, eos_ids=self.eos_ids, device=store.device)
        self.weight_version = self.config.weight_version
        self._bytes = TokenBytes(tokenizer) if tokenizer is not None else None
        self._replies: dict[str, Reply] = {}
        self._paused = False
        self._stats = EngineStats()

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. UserError for one that can never run, QueueFull for one too many."""
        if request.id in self._replies:
            raise UserError("a request of this id is running", where="id", value=request.id, expected="a new id")
        wrong = next((t for t in request.prompt_token_ids if not 0 <= t < self.model.config.vocab_size), None)
        if wrong is not None:
            raise UserError(
                "no such token", where="prompt_token_ids", value=wrong, expected=f"0 to {self.model.config.vocab_size - 1}"
            )
        sequence = self.scheduler.add(request)
        try:
            self.sampler.add(request)
        except UserError:
            self.scheduler.drop(sequence)
            raise
        self._replies[request.id] = Reply(sequence, self._bytes, self.eos_ids)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its memory; one that is unknown or done is no error."""
        reply = self._replies.pop(request_id, None)
        if reply is not None:
            self._forget(reply.sequence)

    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._replies) and not self._paused

    # -- a step --------------------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Compute one batch; what became new of each request in it."""
        if not self.has_work():
            return []
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        self._stats.schedule_seconds += time.perf_counter() - start
        if not plan:
            return []
        self._stats.steps += 1
        return self._sample(plan, self.runner.forward(plan))

    def _sample(self, plan: Plan, forward: Forward) -> list[Output]:
        """Draw the step's tokens and commit them."""
        for chunk in plan.chunks:
            self.scheduler.computed(chunk.sequence, chunk.end)
            self._stats.prompt_tokens += chunk.end - chunk.start
        if not plan.sampled:
            return []
        rows = torch.tensor(forward.first_rows, device=self.runner.device)
        logits_RV = self.model.logits(forward.hidden_NM[rows])
        chains = [Chain(s.id, s.reply_tokens) for s in plan.sampled]
        sampled = self.sampler.sample(logits_RV, chains)
        found = zip(plan.sampled, sampled.tokens(), sampled.token_logprobs(), strict=True)
        return [self._commit(s, tokens, logprobs) for s, tokens, logprobs in found]

    def _commit(self, sequence: Sequence, tokens: list[int], logprobs: list[Any] | None) -> Output:
        """Add new tokens to a reply, end it if they do, and keep what is worth caching."""
        if sequence.decoding:
            self.scheduler.computed(sequence, sequence.computed + len(tokens), decoded=True)
        reply = self._replies[sequence.id]
        output = reply.extend(tokens, logprobs, self.weight_version)
        self._stats.generated_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            del self._replies[sequence.id]
            self._forget(sequence)
        return output

    def _forget(self, sequence: Sequence) -> None:
        self.scheduler.drop(sequence)
        self.sampler.remove(sequence.id)

    # -- control -------------------------------------------------------------------------------------------------------

    def pause(self, mode: Literal["keep", "abort"] = "keep") -> list[Output]:
        """Stop computing. keep: requests stay where they are; abort: each ends with what it has (the outputs returned)."""
        self._paused = True
        if mode == "keep":
            return []
        outputs = [reply.end("abort", self.weight_version) for reply in self._replies.values()]
        for request_id in list(self._replies):
            self.abort(request_id)
        return outputs

    def resume(self) -> None:
        """Go on after a pause."""
        self._paused = False

    def flush_cache(self) -> None:
        """Forget cached prefixes that no running request holds on to."""
        self.scheduler.forget_cached()

    def check_integrity(self) -> None:
        """Raise Failure unless every page and slot is free or owned."""
        self.scheduler.check()

    def stats(self) -> EngineStats:
        """A snapshot."""
        s, now = self.scheduler, self._stats
        now.running, now.waiting = len(s.running), len(s.waiting)
        now.paused = len(self._replies) if self._paused else 0
        now.slots_total, now.slots_free = s.slots.size, s.slots.free
        now.pages_total, now.pages_free = s.pages.size, s.pages.free
        now.cached_tokens, now.preemptions = s.cached_tokens, s.preemptions
        now.weight_version = self.weight_version
        return replace(now)


def _eos_ids(model: Ling, tokenizer: Any) -> Collection[int]:
    if tokenizer is not None:
        return stop_ids(tokenizer, model.config)
    eos = model.config.eos_token_id
    return {eos} if isinstance(eos, int) else set(eos or ())
