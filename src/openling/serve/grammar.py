"""Grammars that a reply must match, through llguidance: JSON schemas, any JSON object, regular expressions, Lark.

Compiling happens on threads of its own with a time limit; a grammar that fails, fails its own request. A `Matcher` belongs to one
request: it says which tokens may come next, follows those that came, and takes drafts back.

Legend: K drafts, W words of 32 tokens.
"""

from __future__ import annotations

import importlib.util
import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openling.errors import Failure, UserError
from openling.serve.detokenize import TokenBytes
from openling.serve.types import Grammar

# A space, or a line's indentation: no room for endless white space, which small models fall into.
WHITE_SPACE = r" |\n {0,24}"
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclass(frozen=True)
class GrammarLimits:
    """What a grammar may cost. seconds: from `submit` to a matcher, the wait for a free thread included.

    Reading a large vocabulary takes seconds once: `start_seconds` more for grammars that come before that is done.
    """

    max_chars: int = 262_144
    max_depth: int = 64
    seconds: float = 5.0
    start_seconds: float = 30.0
    cached: int = 64
    threads: int = 2


class Matcher:
    """Where one reply stands in its grammar."""

    def __init__(self, state: Any, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._state = state
        self._words = (vocab_size + 31) // 32
        self._eos_ids = eos_ids
        self._ends = 0  # end-of-text tokens that came: llguidance does not count those among what it can take back

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the reply can follow."""
        return self._ends > 0 or bool(self._state.is_stopped())

    @property
    def is_complete(self) -> bool:
        """Whether the reply could end here and match."""
        return bool(self._state.is_accepting())

    def masks(self, drafts: Sequence[int] = ()) -> Tensor:
        """Tokens allowed next and after each of the drafts, int32 [K + 1, W], lowest bit first; the state stays where it is.

        Behind a draft that ends the reply or that the grammar forbids everything is allowed: nobody uses those rows.
        Raises Failure where the grammar has become too complex.
        """
        words_KW = np.full((len(drafts) + 1, self._words), -1, dtype=np.int32)
        self._fill(words_KW[0])
        followed = 0
        for row_W, draft in zip(words_KW[1:], drafts, strict=True):
            if draft in self._eos_ids or not self._state.validate_tokens([draft]) or not self._state.consume_token(draft):
                break
            followed += 1
            self._fill(row_W)
        self.rollback(followed)
        return torch.from_numpy(words_KW)

    def advance(self, tokens: Sequence[int]) -> None:
        """Follow tokens of the reply, the end-of-text token included. Raises Failure for one that the grammar forbids."""
        for token in tokens:
            if token in self._eos_ids and self.is_complete:
                self._ends += 1
            elif self._ends or not self._state.consume_token(token):
                raise Failure("the reply left its grammar, or that became too complex", value=self._error())

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back."""
        ends = min(count, self._ends)
        self._ends -= ends
        if count > ends and not self._state.rollback(count - ends):
            raise Failure("the grammar cannot go back", value=self._error())

    def _fill(self, row_W: np.ndarray) -> None:
        self._state.unsafe_compute_mask_ptr(row_W.ctypes.data, row_W.nbytes)
        if self._state.is_error():
            raise Failure("the grammar became too complex", value=self._error())

    def _error(self) -> str:
        return _first_lines(self._state.get_error())


class GrammarCompiler:
    """Makes matchers for one tokenizer. vocab_size: width of the logits; eos_ids: tokens that end a reply."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_ids: Collection[int], limits: GrammarLimits | None = None) -> None:
        self.limits = limits or GrammarLimits()
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, sorted(eos_ids)
        self._cache: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Grammar, Future[Matcher]]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, grammar: Grammar) -> Future[Matcher]:
        """A matcher at the grammar's beginning; done at once where the grammar is known. Returns without waiting.

        The future raises UserError for a grammar that is wrong, too large or too slow to compile.
        """
        future: Future[Matcher] = Future()
        with self._lock:
            compiled = self._cache.get(grammar)
            if compiled is not None:
                self._cache.move_to_end(grammar)
        if compiled is not None:
            future.set_result(self._matcher(compiled))
            return future
        self._start_threads()
        seconds = self.limits.seconds + (0 if "_ll_tokenizer" in self.__dict__ else self.limits.start_seconds)
        late = UserError("the grammar takes too long to compile", value=grammar.kind, expected=f"{seconds:g} s at most")
        timer = threading.Timer(seconds, lambda: _settle(future, error=late))
        timer.daemon = True
        timer.start()
        future.add_done_callback(lambda _: timer.cancel())
        self._jobs.put((grammar, future))
        return future

    def _start_threads(self) -> None:
        with self._lock:
            while len(self._threads) < self.limits.threads:
                # Daemons: a compilation that hangs must not keep the process alive.
                thread = threading.Thread(target=self._work, name="grammar", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        while True:
            grammar, future = self._jobs.get()
            if future.done():
                continue
            try:
                _settle(future, result=self._matcher(self._compile(grammar)))
            except Exception as error:  # the boundary of this thread: whatever went wrong belongs to this request
                _settle(future, error=error if isinstance(error, UserError) else UserError(f"the grammar failed: {error}"))

    def _compile(self, grammar: Grammar) -> Any:
        with self._lock:
            if grammar in self._cache:
                return self._cache[grammar]
        _check_size(grammar, self.limits)
        with self._building:
            tokens = self._ll_tokenizer
        from llguidance import LLMatcher

        compiled = LLMatcher(tokens, _source(grammar), log_level=0)
        if compiled.is_error():
            raise UserError("the grammar cannot be compiled", where=grammar.kind, value=_first_lines(compiled.get_error()))
        start = compiled.deep_copy()
        start.compute_bitmask()
        if start.is_error() or start.is_stopped():  # as {"$ref": "#"}, which refers to itself for ever
            raise UserError("nothing can be written that matches the grammar", where=grammar.kind)
        with self._lock:
            self._cache[grammar] = compiled
            if len(self._cache) > self.limits.cached:
                self._cache.popitem(last=False)
        return compiled

    def _matcher(self, compiled: Any) -> Matcher:
        return Matcher(compiled.deep_copy(), self._vocab_size, self._eos_ids)

    @cached_property
    def _ll_tokenizer(self) -> Any:
        if importlib.util.find_spec("llguidance") is None:
            raise UserError("grammars need the package llguidance", next="pip install 'openling[serve]'")
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids))
        return LLTokenizer(vocabulary, eos_token=self._eos_ids)


class _Vocabulary:
    """A tokenizer as llguidance wants it: the bytes of every token, and a way to encode text."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Sequence[int]) -> None:
        token_bytes = TokenBytes(tokenizer)
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [token_bytes.full(id) for id in range(vocab_size)]  # none where the model has more ids
        self.special_token_ids = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._encode = tokenizer.backend_tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        return list(self._encode(text, add_special_tokens=False).ids)


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.text))
    if grammar.kind == "lark":
        return str(LLMatcher.grammar_from_lark(grammar.text))
    schema = '{"type": "object"}' if grammar.kind == "json_object" else grammar.text
    try:
        return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE_SPACE}))
    except ValueError as error:
        raise UserError("the JSON schema is not JSON", value=error) from error


def _check_size(grammar: Grammar, limits: GrammarLimits) -> None:
    if len(grammar.text) > limits.max_chars:
        raise UserError(
            "the grammar is too long", value=f"{len(grammar.text)} characters", expected=f"at most {limits.max_chars}"
        )
    if grammar.kind == "json_schema":
        depth = most = 0
        for c in _STRINGS.sub("", grammar.text):
            depth += (c in "[{") - (c in "]}")
            most = max(most, depth)
        if most > limits.max_depth:
            raise UserError(
                "the JSON schema is nested too deeply", value=f"{most} levels", expected=f"at most {limits.max_depth}"
            )


def _settle(future: Future[Matcher], *, result: Matcher | None = None, error: UserError | None = None) -> None:
    """Finish a future unless the clock, the worker or the requester was first."""
    try:
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)
    except InvalidStateError:
        pass


def _first_lines(message: str, count: int = 8) -> str:
    """An error of llguidance without the dump of its state."""
    return "\n".join(message.split("<state>")[0].strip().splitlines()[:count])
