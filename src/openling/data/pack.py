"""Documents to token windows, and the order in which training reads them.

Legend: N windows, T tokens of a window, B windows of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np

from openling.data.batches import NO_TARGET, PackedBatch, packed
from openling.errors import UserError

# Documents per call of the tokenizer: enough to keep its threads busy, few enough to stop soon after `max_tokens`.
DOCUMENTS_AT_ONCE = 64


def tokenise(documents: Iterable[str], tokenizer: Any, *, vocab_size: int, max_tokens: int | None = None) -> np.ndarray:
    """All documents as one int32 array, an end-of-text token after each; at most `max_tokens`, reading no further.

    `tokenizer` is a transformers tokenizer; no special tokens but the end-of-text one are added. A tokenizer with more
    tokens than the model has (`vocab_size`), or with no end-of-text token, is a `UserError`.
    """
    if len(tokenizer) > vocab_size:
        raise UserError(
            "the tokenizer has tokens that the model has not",
            where=tokenizer.name_or_path or "tokenizer",
            value=f"{len(tokenizer)} tokens",
            expected=f"at most vocab_size = {vocab_size}",
        )
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "the tokenizer has no end-of-text token", where=tokenizer.name_or_path or "tokenizer", expected="eos_token"
        )
    parts: list[np.ndarray] = [np.empty(0, np.int32)]
    count, source = 0, iter(documents)
    while (max_tokens is None or count < max_tokens) and (texts := list(islice(source, DOCUMENTS_AT_ONCE))):
        # verbose=False: a document longer than the model's context is what windows are for.
        for ids in tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            parts.append(np.asarray([*ids, end], np.int32))
            count += len(ids) + 1
    return np.concatenate(parts)[:max_tokens]


def cut_windows(tokens: np.ndarray, length: int, *, at_least: int = 1, where: object = None) -> np.ndarray:
    """Consecutive windows [N, T = length] of a token array, the rest dropped; a `UserError` below `at_least` windows."""
    count = len(tokens) // length
    if count < at_least:
        raise UserError(
            "the text is too short",
            where=where,
            value=f"{len(tokens)} tokens",
            expected=f"{at_least * length} tokens ({at_least} windows of {length})",
        )
    return tokens[: count * length].reshape(count, length)


class Batches:
    """A `BatchSource` of windows [N, T] that are whole to the model: each once per epoch, in an order drawn from seed and epoch.

    Batches run across the ends of epochs, so no window is dropped.
    """

    def __init__(self, windows_NT: np.ndarray, *, batch_size: int, seed: int = 0) -> None:
        self.windows, self.batch_size, self.seed = windows_NT, batch_size, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * int(self.windows.shape[1])

    def batch(self, step: int) -> PackedBatch:
        """Batch `step`."""
        length = self.windows.shape[1]
        chosen = [self._window(i) for i in range(step * self.batch_size, (step + 1) * self.batch_size)]
        ids = self.windows[chosen].astype(np.int64)
        targets = np.full_like(ids, NO_TARGET)
        targets[:, :-1] = ids[:, 1:]
        return packed(ids, targets, list(range(0, ids.size, length)), {})

    def _window(self, draw: int) -> int:
        epoch, index = divmod(draw, len(self.windows))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.windows))
        return int(self._order[1][index])

    def fingerprint(self) -> str:
        """A hash of windows, batch size and seed."""
        digest = hashlib.sha256(self.windows.tobytes())
        digest.update(repr((self.windows.shape, self.batch_size, self.seed)).encode())
        return digest.hexdigest()
