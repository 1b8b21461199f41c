"""Documents to token windows, and the order in which training reads them.

Legend: N windows, T tokens of a window, B windows of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


class Batches(Iterator[Tensor]):
    """An endless stream of batches [B, T] int64: every window once per epoch, in an order drawn from seed and epoch.

    Batches run across the ends of epochs, so no window is dropped. `state_dict` is a place in the stream, exact to the batch.
    """

    def __init__(self, windows_NT: np.ndarray, *, batch_size: int, seed: int = 0) -> None:
        self.windows = windows_NT
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.index = 0
        self._order = self._draw()

    def _draw(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.windows))

    def __next__(self) -> Tensor:
        chosen: list[int] = []
        while len(chosen) < self.batch_size:
            if self.index == len(self.windows):
                self.epoch, self.index = self.epoch + 1, 0
                self._order = self._draw()
            taken = self._order[self.index : self.index + self.batch_size - len(chosen)]
            chosen.extend(taken.tolist())
            self.index += len(taken)
        return torch.from_numpy(self.windows[chosen].astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, and a fingerprint of what is streamed."""
        digest = hashlib.sha256(self.windows.tobytes()).hexdigest()
        stream = {"windows": list(self.windows.shape), "sha256": digest, "batch_size": self.batch_size, "seed": self.seed}
        return {"epoch": self.epoch, "index": self.index, "stream": stream}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place; a `UserError` when that was a place in another stream."""
        for name, value in self.state_dict()["stream"].items():
            if state["stream"][name] != value:
                raise UserError(
                    "the training data differ from those of the checkpoint",
                    where=name,
                    value=value,
                    expected=state["stream"][name],
                    next="resume with the same text, tokenizer, batch size and seed, or train into a new folder",
                )
        self.epoch, self.index = state["epoch"], state["index"]
        self._order = self._draw()
