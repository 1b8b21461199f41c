"""Tokens to text, one at a time: never half a character, stop strings across tokens, and each token's own bytes.

Every token has bytes of its own, and the text is their UTF-8 decoding as it comes. Byte-level and SentencePiece-like tokenizers
say which bytes; of any other tokenizer it is what decoding the token after its predecessor adds. Work per token does not depend
on the length of the text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from openling.data.messages import MARKS

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of each token of a `transformers` tokenizer (a fast one). Special tokens have none, except `shown` ones."""

    def __init__(self, tokenizer: Any, *, shown: Collection[str] = MARKS) -> None:
        self._backend = tokenizer.backend_tokenizer
        decoder = self._backend.decoder
        # A decoder's pickled state is its part of tokenizer.json; the whole file would take a large vocabulary's time.
        kinds = _decoder_kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
        self._byte_level = "ByteLevel" in kinds
        self._pieces = "ByteFallback" in kinds or "Metaspace" in kinds
        added = self._backend.get_added_tokens_decoder()  # decoded like other tokens, as long as they are no special ones
        self._hidden = {id for id, token in added.items() if token.special and token.content not in shown}
        self._cache: dict[int, bytes] = {}

    def of(self, id: int, *, after: int | None = None) -> bytes:
        """What the token adds to a text. after: the token before it, which matters to tokenizers that join words."""
        return b"" if id in self._hidden else self.full(id, after=after)

    def full(self, id: int, *, after: int | None = None) -> bytes:
        """The same, with special tokens written out: what APIs show beside log-probabilities."""
        if id not in self._cache:
            own = self._own(id)
            if own is None:
                return self._joined(id, after)
            self._cache[id] = own
        return self._cache[id]

    def text(self, id: int, *, after: int | None = None) -> str:
        """`full` as text; bytes that are no character on their own become U+FFFD."""
        return self.full(id, after=after).decode(errors="replace")

    def offsets(self, ids: Sequence[int], *, start: int = 0) -> list[int]:
        """Where each token begins in the text of `ids` that shows special tokens: characters, counted from `start`.

        A token that begins inside a character has that character's place.
        """
        decoder = _utf8()
        found = []
        before: int | None = None
        for id in ids:
            found.append(start)
            start += len(decoder.decode(self.full(id, after=before)))
            before = id
        return found

    def _own(self, id: int) -> bytes | None:
        """Bytes that do not depend on neighbours; None where they do. An id without a token has none."""
        piece = self._backend.id_to_token(id)
        if piece is None:
            return b""
        if self._byte_level:
            table = _byte_alphabet()
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
        if self._pieces:
            match = _BYTE_PIECE.fullmatch(piece)
            return bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()
        return None

    def _joined(self, id: int, after: int | None) -> bytes:
        def text_of(*ids: int) -> str:
            return self._backend.decode(list(ids), skip_special_tokens=False)

        if after is None or after in self._hidden:
            return text_of(id).encode()
        return text_of(after, id)[len(text_of(after)) :].encode()


class Detokenizer:
    """The text of one reply, token by token.

    stop: strings that end it. The one that is complete first counts, the longest of several; text before it is final, the string
    itself is left out unless `include_stop`, and `stopped` names it. What may still become a stop string is held back.
    """

    def __init__(self, tokens: TokenBytes, *, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        self.stopped: str | None = None
        self._tokens = tokens
        self._utf8 = _utf8()
        self._stop = tuple(sorted((s for s in stop if s), key=len, reverse=True))
        self._include_stop = include_stop
        self._last: int | None = None
        self._held = ""

    def push(self, id: int, *, may_stop: bool = True) -> str:
        """Text that became certain with this token. may_stop False (below min_tokens): stop strings completed here are text."""
        piece = self._utf8.decode(self._tokens.of(id, after=self._last))
        self._last = id
        return self._emit(piece, may_stop)

    def finish(self) -> str:
        """The rest, when no token comes any more: what was held back, U+FFFD for an unfinished character."""
        rest = self._emit(self._utf8.decode(b"", final=True), True)
        held, self._held = self._held, ""
        return rest + held

    def _emit(self, piece: str, may_stop: bool) -> str:
        if self.stopped is not None:
            return ""
        if not self._stop:
            return piece
        text, scanned = self._held + piece, len(self._held)
        for end in range(scanned + 1, len(text) + 1) if may_stop else ():
            match = next((s for s in self._stop if text.endswith(s, 0, end)), None)
            if match is not None:
                self.stopped, self._held = match, ""
                return text[:end] if self._include_stop else text[: end - len(match)]
        longest = min(len(text), len(self._stop[0]) - 1)
        keep = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) and len(s) > n for s in self._stop)), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def stream_text(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens` in pieces, as they come; a piece waits until its last character is whole.

    `tokenizer` is a fast `transformers` one; special tokens are left out. The pieces join to the decoded text of all tokens, with
    the space that SentencePiece-like decoders strip from its beginning.
    """
    text = Detokenizer(TokenBytes(tokenizer))
    for token in tokens:
        if piece := text.push(token):
            yield piece
    if rest := text.finish():
        yield rest


def _utf8() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")


def _decoder_kinds(decoder: dict[str, Any]) -> set[str]:
    """The types of a tokenizer.json's decoder, sequences taken apart."""
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in decoder.get("decoders", ())))


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, other bytes from U+0100 up in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
