"""The text side of a served model: tokenizing, token texts and bytes. The folder's tokenizer, used without its mutable state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from openling.data.chat import ChatRenderer
from openling.errors import UserError
from openling.serve.detokenize import TokenBytes, stream_text
from openling.serve.parsers import ReplyFormat, ReplyParser
from openling.serve.types import Grammar

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


class ModelText:
    """A fast `transformers` tokenizer as the server uses it; safe to use from several threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, reply_format: ReplyFormat) -> None:
        """reply_format: how the model writes thinking and tool calls."""
        if tokenizer is None or not getattr(tokenizer, "is_fast", False):
            raise UserError("serving needs a fast tokenizer", expected="tokenizer.json", next="copy the teacher's there")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.bytes = TokenBytes(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        # Rendered in a process of its own, which can be stopped: a template is code from a folder.
        self._renderer = ChatRenderer(tokenizer, isolated=True) if tokenizer.chat_template is not None else None
        self._format = reply_format
        self._special = frozenset(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        # Characters of the longest token: a text longer than that times the context cannot fit it.
        self.longest_token = max((len(piece) for piece in tokenizer.get_vocab()), default=1)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; special: with what the tokenizer puts around a text."""
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, kwargs: Mapping[str, Any], *, continued: bool = False
    ) -> str:
        """The text of a conversation, opened for the assistant's turn, or `continued` in its last message.

        Raises UserError where it cannot be rendered.
        """
        if self._renderer is None:
            raise UserError("this model has no chat template", expected="/v1/completions")
        render = self._renderer.render_open if continued else self._renderer.render
        return render(messages, tools=tools, kwargs=kwargs)

    def warm_up(self) -> None:
        """Start the template's process, so that the first request need not wait for it."""
        if self._renderer is not None:
            with suppress(UserError):  # a template may refuse this message and take others
                self.render([{"role": "user", "content": "hello"}], None, {})

    def parser(self, prompt: str, tools: Sequence[Mapping[str, Any]]) -> ReplyParser:
        """What takes the reply to a rendered prompt apart; without tools, calls are not looked for."""
        return self._format.parser(prompt, tools)

    def call_grammar(self, prompt: str, tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> Grammar:
        """A reply that calls one of `tools`. Raises UserError where the model's template knows no calls."""
        return self._format.tool_grammar(prompt, tools, parallel=parallel, special=self._special)

    def json_grammar(self, prompt: str, schema: str | None) -> Grammar:
        """A reply of this JSON schema (None: any object), after what the prompt has the model think."""
        grammar = Grammar("json_schema", schema) if schema is not None else Grammar("json_object")
        return self._format.answer_grammar(prompt, grammar, special=self._special)

    def close(self) -> None:
        """End the template's process."""
        if self._renderer is not None:
            self._renderer.close()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids as replies show it: special tokens left out."""
        return "".join(stream_text(self.tokenizer, ids))

    def full(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens written out; it is what `TokenBytes.offsets` counts in."""
        before: int | None = None
        pieces = []
        for id in ids:
            pieces.append(self.bytes.full(id, after=before))
            before = id
        return b"".join(pieces).decode(errors="replace")

    def name(self, id: int, after: int | None = None) -> str:
        """A token as log-probabilities name it: its text, or `bytes:\\xNN...` where its bytes are no text of their own.

        Distinct tokens must not share a name: clients look for the sampled token among its alternatives.
        """
        raw = self.bytes.full(id, after=after)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it; NaN, of a model that is broken, counts as the lowest."""
    return logprob if logprob > LOWEST else LOWEST
