"""The text side of a served model: tokenizing, token texts and bytes. The folder's tokenizer, used without its mutable state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openling.errors import UserError
from openling.serve.detokenize import TokenBytes, stream_text

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


class ModelText:
    """A fast `transformers` tokenizer as the server uses it; safe to use from several threads."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        if tokenizer is None or not getattr(tokenizer, "is_fast", False):
            raise UserError("serving needs a fast tokenizer", expected="tokenizer.json", next="copy the teacher's there")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.bytes = TokenBytes(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        # Characters of the longest token: a text longer than that times the context cannot fit it.
        self.longest_token = max((len(piece) for piece in tokenizer.get_vocab()), default=1)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; special: with what the tokenizer puts around a text."""
        return list(self._backend.encode(text, add_special_tokens=special).ids)

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
    """A log-probability as JSON can say it."""
    return max(logprob, LOWEST)
