"""What a model is given before it writes a document of its own: a document's start, or the opening of a chat (Magpie).

`chat` (arXiv 2406.08464): the template up to where a user's text stands. The model writes the question and ends that turn; what
the template puts between the turns is given, and the model writes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from openling.data.chat import ChatRenderer
from openling.errors import UserError
from openling.model.config import ModelConfig
from openling.model.generate import stop_ids

# What separates documents in the pre-training of the models that have it, also where a later stage ends turns otherwise.
END_OF_TEXT = "<|endoftext|>"
_MARK = "\u2042 question \u2042"


@dataclass(frozen=True)
class Prompt:
    """A document to be written. given: its first tokens; limit: how many it may have; asks: the model writes the question."""

    number: int
    kind: Literal["bos", "chat"]
    given: tuple[int, ...]
    limit: int
    asks: bool = False


@dataclass(frozen=True)
class Written:
    """A document as it ended. ids: what counts of it; cut: ended by its length; fault: why it is none."""

    prompt: Prompt
    ids: list[int]
    cut: bool
    fault: str | None = None


class Prompts:
    """Prompts by number, and what becomes of the tokens behind them. `both` takes turns."""

    def __init__(self, tokenizer: Any, config: ModelConfig, kind: Literal["bos", "chat", "both"], new: int) -> None:
        self.tokenizer, self.kind, self.new = tokenizer, kind, new
        self.start = document_start(tokenizer)
        self.opening: list[int] = []
        self.between: list[int] = []
        self.stops = {self.start, *stop_ids(tokenizer, config)}
        if tokenizer.bos_token_id is not None:
            self.stops.add(tokenizer.bos_token_id)
        if kind != "bos":
            self.opening, self.between = _turns(tokenizer)
            self.stops.add(self.between[0])
        self.room = new + max(1, len(self.opening) + len(self.between))

    def make(self, number: int) -> Prompt:
        """The prompt of a document."""
        if self.kind == "bos" or (self.kind == "both" and number % 2 == 0):
            return Prompt(number, "bos", (self.start,), 1 + self.new)
        return Prompt(number, "chat", tuple(self.opening), len(self.opening) + self.new // 2, asks=True)

    def answered(self, prompt: Prompt, tokens: Sequence[int]) -> Prompt | None:
        """The prompt of the answer, to stand where the question's end stands; None unless a question has ended."""
        question = tokens[len(self.opening) : -1]
        if not prompt.asks or tokens[-1] != self.between[0] or not self.decode(question).strip():
            return None
        return replace(prompt, given=tuple(self.between), limit=self.room, asks=False)

    def written(self, prompt: Prompt, tokens: Sequence[int]) -> Written:
        """The document of these tokens, without what stands before and between documents anyway."""
        ids, last = list(tokens), tokens[-1]
        cut = last not in self.stops
        closes_turn = prompt.kind == "chat" and last == self.between[0] and last != self.tokenizer.eos_token_id
        if not cut and not closes_turn:
            ids.pop()
        if prompt.kind == "bos":
            ids = ids[1:]
        return Written(prompt, ids, cut, "no question, or one without end" if prompt.asks else None)

    def text(self, written: Written) -> str:
        """Its text, control tokens written out; without half a character where it was cut."""
        text = self.decode(written.ids)
        return text.rstrip("\ufffd") if written.cut else text

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text, control tokens written out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def document_start(tokenizer: Any) -> int:
    """The token behind which a document begins: the end of the one before, where there is one for that, else the bos or eos."""
    found = tokenizer.get_added_vocab().get(END_OF_TEXT)
    for id in (found, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if id is not None:
            return int(id)
    raise UserError(
        "the tokenizer has no token that begins a document",
        where=tokenizer.name_or_path,
        expected=f"{END_OF_TEXT}, a bos_token or an eos_token",
        next="--prompt chat",
    )


def _turns(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids before a user's text, and between it and the assistant's."""
    text = ChatRenderer(tokenizer).render([{"role": "user", "content": _MARK}])
    before, found, after = text.partition(_MARK)
    ids = [list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) for part in (before, after)]
    control = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not found or not ids[0] or not ids[1] or ids[1][0] not in control:
        raise UserError(
            "the chat template does not let the model write a question",
            where=tokenizer.name_or_path,
            value=ascii(after[:40]),
            expected="a control token at the end of the user's turn",
            next="--prompt bos",
        )
    return ids[0], ids[1]
