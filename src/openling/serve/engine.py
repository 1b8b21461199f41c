"""The engine: requests go in, every `step` computes one batch, and what became new comes out.

A step: the scheduler picks work and memory, the runner computes it, the sampler draws tokens, and what is certain is committed:
tokens, text, cached prefixes. Between steps everything is consistent: requests may be added and aborted, weights exchanged.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from openling.errors import UserError
from openling.model.capture import Capture, CudaCapture, can_capture
from openling.model.generate import stop_ids
from openling.model.ling import Ling
from openling.serve import control
from openling.serve.detokenize import TokenBytes
from openling.serve.engine_config import EngineConfig
from openling.serve.grammar import GrammarCompiler, Matcher
from openling.serve.graphs import DecodeGraphs
from openling.serve.memory import store_for
from openling.serve.pauses import PauseClock
from openling.serve.payoff import Payoff
from openling.serve.ragged_graphs import RaggedGraphs
from openling.serve.replies import Reply
from openling.serve.runner import Forward, Runner
from openling.serve.sampling import Chain, RowMask, Sampler, first_rows
from openling.serve.scheduler import Plan, Scheduler
from openling.serve.sequence import Sequence
from openling.serve.speculative import Drafter
from openling.serve.types import EngineStats, Output, Request, TokenLogprob


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread owns it (see `AsyncEngine`)."""

    def __init__(self, model: Ling, tokenizer: Any, config: EngineConfig | None = None) -> None:
        """tokenizer: a fast transformers tokenizer, or None (no text, no stop strings; ends at the config's stop tokens)."""
        self.config = config or EngineConfig()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_model_len, self.store = store_for(model, self.config)
        self.drafts = self.store.drafts
        self.scheduler = Scheduler(self.config, self.store, self.max_model_len)
        self.runner = Runner(model, self.store, invariant=self.config.deterministic)
        self.eos_ids = _eos_ids(model, tokenizer)
        self.sampler = Sampler(model.config.vocab_size, eos_ids=self.eos_ids, device=self.store.device)
        self.weight_version = self.config.weight_version
        self._bytes = TokenBytes(tokenizer) if tokenizer is not None else None
        self._replies: dict[str, Reply] = {}
        self._compiling: dict[str, Future[Matcher]] = {}
        self._drafter: Drafter | None = None
        self._prepare()
        self._payoff = Payoff()
        self.pauses, self._released = PauseClock(), False
        self._stats = EngineStats()

    def _prepare(self) -> None:
        """What refers to the memory of model and store."""
        self.runner.pack()
        if not self.config.eager and can_capture(self.model):
            self.use_graphs(CudaCapture())
        if self.drafts:
            self._drafter = Drafter(self.runner, self.drafts, most=self.config.max_running)

    def use_graphs(self, capture: Capture) -> None:
        """Capture steps in which every sequence decodes, and small ones with prompts among them."""
        most, width = self.config.max_running, self.scheduler.table_width
        self.runner.graphs = DecodeGraphs(self.runner, most=most, width=width, capture=capture)
        if not (self.drafts or self.config.deterministic):
            self.runner.ragged_graphs = RaggedGraphs(self.runner, most=most, width=width, capture=capture)

    def warm_up(self) -> int:
        """Capture ahead what steps of running sequences will replay, so that no request waits for it; returns how many graphs.

        Drafting graphs are left to the first drafts. Call it before the first request.
        """
        with torch.inference_mode(), self.runner.mode():
            graphs, ragged = self.runner.graphs, self.runner.ragged_graphs
            verified = {1, 1 + self.drafts}
            return sum(graphs.warm_up(new) for new in verified if graphs) + (ragged.warm_up() if ragged else 0)

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
        if request.params.grammar is not None and self.tokenizer is None:
            raise UserError(
                "a grammar needs a tokenizer", where="grammar", value="no tokenizer", expected="a tokenizer in the folder"
            )
        sequence = self.scheduler.add(request)
        try:
            self.sampler.add(request)
        except UserError:
            self.scheduler.drop(sequence)
            raise
        self._replies[request.id] = Reply(sequence, self._bytes, self.eos_ids)
        if request.params.grammar is not None:
            sequence.admissible = False
            self._compiling[request.id] = self.compiler.submit(request.params.grammar)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its memory; one that is unknown or done is no error."""
        reply = self._replies.pop(request_id, None)
        self._compiling.pop(request_id, None)
        if reply is not None:
            self.scheduler.drop(reply.sequence)
            self.sampler.remove(request_id)

    @cached_property
    def compiler(self) -> GrammarCompiler:
        """Compiles grammars for this engine's tokenizer, also for others to check one before they send it."""
        return GrammarCompiler(self.tokenizer, vocab_size=self.model.config.vocab_size, eos_ids=self.eos_ids)

    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._replies) and not self.pauses.on

    @property
    def blocked(self) -> bool:
        """Whether all requests wait for something else than computation: their grammars."""
        return not self.scheduler.running and not any(s.admissible for s in self.scheduler.waiting)

    # -- a step --------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Compute one batch; what became new of each request in it."""
        if not self.has_work():
            return []
        failed = self._start_matchers()
        start = time.perf_counter()
        plan = self.scheduler.schedule(self._new_tokens())
        scheduled = time.perf_counter()
        self._stats.schedule_seconds += scheduled - start
        if not plan:
            return failed
        self._stats.steps += 1
        self._fold(plan)
        forward = self.runner.forward(plan)
        self._finish_chunks(plan, forward)
        outputs = self._sample(plan, forward) if plan.sampled else []
        if plan.decodes and not plan.chunks:
            tokens = sum(len(output.token_ids) for output in outputs)
            self._payoff.add(len(plan.decodes), drafted=plan.new > 1, tokens=tokens, seconds=time.perf_counter() - start)
        return failed + outputs

    def _new_tokens(self) -> int:
        """Tokens of each decoding sequence in the next step: the certain one, and drafts if there are any."""
        drafting = any(s.drafts for s in self.scheduler.running)
        return 1 + self.drafts if drafting else 1

    def _fold(self, plan: Plan) -> None:
        """A step that verifies nothing reads the states alone: tokens that wait beside them enter first."""
        waiting = [s for s in plan.decodes if s.waiting_tokens]
        if plan.new == 1 and waiting:
            self.store.fold(torch.tensor([s.slot for s in waiting], device=self.store.device))
            for s in waiting:
                s.waiting_tokens = 0

    def _finish_chunks(self, plan: Plan, forward: Forward) -> None:
        """Book the computed parts of prompts, and their log-probabilities."""
        end = len(plan.decodes) * plan.new
        for chunk in plan.chunks:
            start, end = end, end + chunk.end - chunk.start
            self._stats.prompt_tokens += chunk.end - chunk.start
            reply = self._replies[chunk.sequence.id]
            reply.add_prompt_logprobs(chunk.start, forward.hidden_NM[start:end], self.model.logits)
            reply.add_experts(chunk.start, forward.experts_NLk, slice(start, end))
            self.scheduler.computed(chunk.sequence, chunk.end)

    def _sample(self, plan: Plan, forward: Forward) -> list[Output]:
        """Draw the step's tokens and commit them."""
        decodes, sequences = len(plan.decodes), plan.sampled
        drafts = [tuple(s.drafts[: plan.new - 1]) if i < decodes else () for i, s in enumerate(sequences)]
        chains = [Chain(s.id, s.reply_tokens, d) for s, d in zip(sequences, drafts, strict=True)]
        rows = [first + k for first, d in zip(forward.first_rows, drafts, strict=True) for k in range(len(d) + 1)]
        logits_RV = self._logits(forward, rows)
        sampled = self.sampler.sample(logits_RV.float(), chains, mask=self._mask(chains))
        if plan.new > 1 and self.store.window is not None and forward.batch.slots is not None:
            self.store.window.advance(forward.batch.slots, sampled.accepted_C[:decodes] + 1)
        added = sampled.tokens()
        for s, first, tokens in zip(plan.decodes, forward.first_rows, added, strict=False):
            self._replies[s.id].add_experts(s.computed, forward.experts_NLk, slice(first, first + len(tokens)))
        outputs = [
            self._commit(s, len(d), plan.new > 1, tokens, logprobs)
            for s, d, tokens, logprobs in zip(sequences, drafts, added, sampled.token_logprobs(), strict=True)
        ]
        if self._drafter is not None:
            propose = self.config.draft_always or self._payoff.worth_it(sum(not s.done for s in sequences))
            if propose or plan.chunks:
                with self.runner.mode():
                    self._drafter.follow(plan, forward, [len(o.token_ids) for o in outputs], propose=propose)
        for s in sequences:
            if s.done:
                self.abort(s.id)
        return outputs

    def _logits(self, forward: Forward, rows: list[int]) -> Tensor:
        """FP32 logits of some of the step's tokens, [R, V]."""
        if forward.logits_NV is not None and rows == list(range(len(forward.logits_NV))):
            return forward.logits_NV
        index = self.runner.to_device(np.array(rows, dtype=np.int64))
        return self.model.logits(forward.hidden_NM[index]) if forward.logits_NV is None else forward.logits_NV[index]

    def _commit(
        self, sequence: Sequence, drafts: int, verified: bool, tokens: list[int], logprobs: list[TokenLogprob] | None
    ) -> Output:
        """Add new tokens to a reply, end it if they do, and keep what is worth caching."""
        sequence.drafted += drafts
        sequence.accepted += len(tokens) - 1
        self._stats.drafted_tokens += drafts
        self._stats.accepted_tokens += len(tokens) - 1
        before, decoded = sequence.computed, sequence.decoding
        output = self._replies[sequence.id].extend(tokens, logprobs, self.weight_version)
        if decoded:
            sequence.waiting_tokens = len(output.token_ids) if verified else 0
            self.scheduler.computed(sequence, before + len(output.token_ids), decoded=True)
        self._stats.generated_tokens += len(output.token_ids)
        return output

    # -- grammars ------------------------------------------------------------------------------------------------------

    def _start_matchers(self) -> list[Output]:
        """Let requests run whose grammar is compiled; those whose grammar is refused end here."""
        outputs = []
        for request_id, compiled in [(i, c) for i, c in self._compiling.items() if c.done()]:
            del self._compiling[request_id]
            reply = self._replies[request_id]
            error = compiled.exception()
            if error is None:
                reply.matcher, reply.sequence.admissible = compiled.result(), True
            else:
                outputs.append(reply.end("error", self.weight_version, error=str(error)))
                self.abort(request_id)
        return outputs

    def _mask(self, chains: list[Chain]) -> RowMask | None:
        """What the grammars of a step's requests allow."""
        rows: list[int] = []
        words: list[Tensor] = []
        for first, chain in zip(first_rows(chains), chains, strict=True):
            allowed = self._replies[chain.request_id].mask(chain.drafts)
            if allowed is not None:
                words.append(allowed)
                rows += range(first, first + len(chain.drafts) + 1)
        return RowMask(rows, torch.cat(words)) if rows else None

    # -- control -------------------------------------------------------------------------------------------------------

    def pause(self, mode: Literal["keep", "abort"] = "keep") -> list[Output]:
        """Stop computing. keep: requests stay where they are; abort: each ends with what it has (the outputs returned)."""
        self.pauses.pause()
        if mode == "keep":
            return []
        outputs = [reply.end("abort", self.weight_version) for reply in self._replies.values()]
        for request_id in list(self._replies):
            self.abort(request_id)
        return outputs

    def resume(self) -> None:
        """Go on after a pause."""
        if self._released:
            raise UserError("the engine has given its memory back", where="resume", next="restore_memory first")
        self.pauses.resume()

    def update_weights(
        self, version: str, named_tensors: Iterable[tuple[str, Tensor]], hashes: Mapping[str, str] | None = None
    ) -> None:
        """Exchange weights between two steps, all or none; hashes: `control.tensor_hash` of each, checked where given.

        What was computed with the old ones is forgotten: requests, also paused ones, start again with the tokens they have.
        """
        control.exchange(self.model, named_tensors, hashes)
        self.runner.pack()
        self.scheduler.flush()
        self.weight_version = version

    def get_weight(self, name: str) -> Tensor:
        """A copy of a weight on the host."""
        return control.get_weight(self.model, name)

    def checksum(self) -> str:
        """SHA-256 over all weights."""
        return control.checksum(self.model)

    def release_memory(self) -> None:
        """Give the device's memory back: weights go to the host, everything computed is forgotten. Pauses the engine."""
        self.pauses.pause()
        self._released = True
        self.scheduler.flush()
        self.store.release()
        self.runner.graphs = self.runner.ragged_graphs = None
        self.model.to("cpu")

    def restore_memory(self) -> None:
        """Take back what `release_memory` gave, if it did; the engine stays paused."""
        if not self._released:
            return  # new pools would be empty under sequences that run
        self.model.to(self.store.device)
        self.store.restore()
        self._prepare()
        self._released = False

    def flush_cache(self) -> None:
        """Forget cached prefixes; running requests keep theirs."""
        self.scheduler.forget_cached()

    def check_integrity(self) -> None:
        """Raise Failure unless every page and slot is free or owned."""
        self.scheduler.check()

    def stats(self) -> EngineStats:
        """A snapshot."""
        s, now = self.scheduler, self._stats
        now.running, now.waiting = len(s.running), len(s.waiting)
        now.paused = len(self._replies) if self.pauses.on else 0
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
