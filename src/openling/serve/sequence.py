"""One request on its way through the engine: its tokens, what of them is computed, and the memory it holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from openling.model.paged import PAGE
from openling.serve.radix import Node, page_keys
from openling.serve.types import Request


@dataclass(eq=False)
class Sequence:
    """tokens: prompt and reply; the first `computed` of them are in pages and slot. arrival orders requests by age.

    node: the deepest node of the prefix tree whose path this sequence holds. rolling: the node that has the newest state of the
    reply. cuts: where prompt chunks must end because a copy of the state is wanted there. drafts: what the MTP layer expects
    next. waiting_tokens: accepted ones that are not in the slot's state yet. admissible: not
    waiting for anything but memory. active: running, with memory. done: the reply has
    ended. cached: prompt tokens
    taken over when it first ran.
    """

    request: Request
    arrival: int
    table: np.ndarray
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    node: Node | None = None
    rolling: Node | None = None
    cuts: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    waiting_tokens: int = 0
    admissible: bool = True
    active: bool = False
    done: bool = False
    cached: int | None = None
    drafted: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)

    @property
    def id(self) -> str:
        """The request's."""
        return self.request.id

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def reply_tokens(self) -> int:
        """Tokens of the reply so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def decoding(self) -> bool:
        """Whether only the newest token is not computed yet."""
        return self.computed == len(self.tokens) - 1 and self.computed > 0

    @property
    def shares(self) -> bool:
        """Whether it may start behind cached tokens: not if something is asked of every token of the prompt."""
        return self.request.params.prompt_logprobs is None and not self.request.params.routed_experts

    def page_keys(self) -> list[bytes]:
        """Keys of its whole pages; those known before are not made again."""
        done = len(self.keys)
        if (done + 1) * PAGE <= len(self.tokens):
            self.keys += page_keys(self.tokens[done * PAGE :])
        return self.keys

    def hold(self, page: int) -> None:
        """One more page behind those it has."""
        self.table[len(self.pages)] = page
        self.pages.append(page)
