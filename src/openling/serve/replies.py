"""A reply as it grows: which tokens count, what text they make, and why it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from openling.errors import Failure
from openling.serve.detokenize import Detokenizer, TokenBytes
from openling.serve.grammar import Matcher
from openling.serve.sampling import prompt_logprobs
from openling.serve.sequence import Sequence
from openling.serve.types import FinishReason, Output, TokenLogprob


class Reply:
    """Turns the tokens of a sequence into outputs. `end_ids` end a reply unless the request ignores them; they have no text."""

    def __init__(self, sequence: Sequence, tokens: TokenBytes | None, end_ids: Collection[int]) -> None:
        self.sequence = sequence
        params = sequence.request.params
        # What the next output brings along: of the prompt, and of tokens computed since the last output.
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if params.prompt_logprobs is not None else None
        self.experts: list[list[list[int]]] = []
        self._experts_of = 0
        self.matcher: Matcher | None = None
        self.failure: str | None = None
        self._stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(end_ids))
        self._text = Detokenizer(tokens, stop=params.stop, include_stop=params.include_stop) if tokens is not None else None

    def mask(self, drafts: tuple[int, ...]) -> Tensor | None:
        """What the grammar allows next and after each draft; a grammar that gives up ends its reply, not the step."""
        if self.matcher is None or self.failure is not None:
            return None
        try:
            return self.matcher.masks(drafts)
        except Failure as error:
            self.failure = str(error)
            return None

    def add_prompt_logprobs(self, start: int, hidden_TM: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
        """Take those of the prompt's tokens behind position `start`, from the final hidden states of a chunk."""
        params, ids = self.sequence.request.params, self.sequence.request.prompt_token_ids
        if params.prompt_logprobs is None or self.prompt_logprobs is None:
            return
        first, end = len(self.prompt_logprobs) - 1, min(start + len(hidden_TM), len(ids) - 1)
        if first < end:
            hidden = hidden_TM[first - start : end - start]
            wanted = torch.tensor(ids[first + 1 : end + 1], device=hidden.device)
            for part in prompt_logprobs(logits_of, hidden, wanted, top=params.prompt_logprobs, temperature=params.temperature):
                self.prompt_logprobs += part

    def add_experts(self, start: int, experts_NLk: Tensor | None, rows: slice) -> None:
        """Take the experts of the context's tokens from `start` on, each once."""
        if experts_NLk is not None and self.sequence.request.params.routed_experts:
            new = experts_NLk[rows].tolist()[max(0, self._experts_of - start) :]
            self.experts += new
            self._experts_of += len(new)

    def extend(self, tokens: list[int], logprobs: list[TokenLogprob] | None, weight_version: str) -> Output:
        """Add sampled tokens up to the one that ends the reply; those behind it never were."""
        if self.failure is not None:
            return self.end("error", weight_version, self.failure)
        sequence, params = self.sequence, self.sequence.request.params
        text, reason, stop = "", None, None
        kept: list[int] = []
        for token in tokens:
            sequence.tokens.append(token)
            kept.append(token)
            reason, stop, piece = self._add(token)
            text += piece
            if reason is not None:
                break
        if self.matcher is not None:
            try:
                self.matcher.advance(kept)
            except Failure as error:  # too complex to go on with: this reply ends, not the step
                return self.end("error", weight_version, str(error))
            reason = reason or ("stop" if self.matcher.is_finished else None)
        if reason is not None and self._text is not None:
            text += self._text.finish()
        logprobs = logprobs[: len(kept)] if logprobs is not None and params.logprobs is not None else None
        return self._output(kept, text, logprobs, weight_version, reason, stop)

    def end(self, reason: FinishReason, weight_version: str, error: str | None = None) -> Output:
        """End a reply from outside, with what it has."""
        text = self._text.finish() if self._text is not None else ""
        output = self._output([], text, None, weight_version, reason, None)
        output.error = error
        return output

    def _output(
        self,
        tokens: list[int],
        text: str,
        logprobs: list[TokenLogprob] | None,
        weight_version: str,
        reason: FinishReason | None,
        stop: int | str | None,
    ) -> Output:
        sequence = self.sequence
        sequence.done = reason is not None
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        experts, self.experts = self.experts, []
        return Output(
            sequence.id,
            tokens,
            text,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            routed_experts=experts if sequence.request.params.routed_experts else None,
            weight_version=weight_version,
            finish_reason=reason,
            stop_reason=stop,
            prompt_tokens=sequence.prompt_tokens,
            cached_tokens=sequence.cached or 0,
            completion_tokens=sequence.reply_tokens,
            drafted_tokens=sequence.drafted,
            accepted_tokens=sequence.accepted,
        )

    def _add(self, token: int) -> tuple[FinishReason | None, int | str | None, str]:
        """Why the reply ends with this token, if it does, and the text it adds."""
        params, count = self.sequence.request.params, self.sequence.reply_tokens
        may_stop = count > params.min_tokens
        if token in self._stops and may_stop:
            return "stop", token, ""
        text = self._text.push(token, may_stop=may_stop) if self._text is not None else ""
        if self._text is not None and self._text.stopped is not None:
            return "stop", self._text.stopped, text
        return ("length" if count >= params.max_tokens else None), None, text
