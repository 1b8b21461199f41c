"""Text to token ids in bulk, with the tokenizers library alone: nothing here imports torch or transformers.

Control tokens that a text spells out ("<|endoftext|>" in a manual) are encoded as ordinary text: only the end-of-text token
behind each document is one, unless the text is said to be trusted (rendered chats, what a model itself wrote).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from openling.errors import UserError

# Characters per call: keeps the library's threads busy. A longer text goes in as pieces cut behind a line's end.
AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TokenizerInfo:
    """What a tokenised corpus remembers of its tokenizer."""

    sha256: str
    vocab_size: int
    eos_token_id: int

    def as_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest type that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


def describe(tokenizer: Any) -> tuple[TokenizerInfo, str]:
    """(what is remembered, the whole as JSON for worker processes) of a transformers tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
    if backend is None:
        raise UserError("the tokenizer has no fast form", where=name, expected="tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token", where=name, expected="eos_token")
    text = backend.to_str()
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return TokenizerInfo(_sha256(json.loads(text), tokenizer.eos_token_id), vocab_size, tokenizer.eos_token_id), text


def _sha256(parts: dict[str, Any], end: int) -> str:
    """A hash of what decides the ids of a text; padding, truncation, templates and decoding do not."""
    model = dict(parts["model"])
    if "merges" in model:  # older files hold "a b", newer ones ["a", "b"]
        model["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    added = [(t["id"], t["content"]) for t in parts["added_tokens"]]
    what = [model, added, parts["normalizer"], parts["pre_tokenizer"], end]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class Encoder:
    """Documents to arrays of ids, the end-of-text token last."""

    def __init__(self, tokenizer_json: str, info: TokenizerInfo, *, control_tokens: bool = False) -> None:
        """control_tokens: those that a text spells out are meant."""
        from tokenizers import Tokenizer

        self.info = info
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not control_tokens

    def encode(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """One array per text, in order."""
        waiting: list[list[str]] = []
        size = 0
        for text in texts:
            waiting.append(list(pieces(text)))
            size += len(text)
            if size >= AT_ONCE:
                yield from self._encode(waiting)
                waiting, size = [], 0
        yield from self._encode(waiting)

    def _encode(self, documents: list[list[str]]) -> Iterator[np.ndarray]:
        flat = [piece for document in documents for piece in document]
        encoded = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        end = np.array([self.info.eos_token_id], self.info.dtype)
        for document in documents:
            yield np.concatenate([*(np.array(next(encoded).ids, self.info.dtype) for _ in document), end])


def pieces(text: str, longest: int = AT_ONCE) -> Iterator[str]:
    """A text in pieces of at most `longest` characters, each cut behind a line's end and before a letter where there is one.

    Byte-level tokenizers split there by themselves, so that the ids are those of the whole text.
    """
    start = 0
    while len(text) - start > longest:
        stop = start + longest
        cut = text.rfind("\n", start, stop - 1) + 1
        while cut > start and not text[cut].isalpha():
            cut = text.rfind("\n", start, cut - 1) + 1
        cut = cut if cut > start else stop
        yield text[start:cut]
        start = cut
    yield text[start:]
