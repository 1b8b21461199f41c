"""How much may be under way at once, all together and per key: what is beyond is answered 429 before any work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from openling.config.serve import LimitsConfig
from openling.serve.problems import bad, overloaded


@dataclass
class Load:
    """Replies and their prompt tokens."""

    replies: int = 0
    prompt_tokens: int = 0


class Admission:
    """Counts what is under way. One thread (the event loop's) uses it."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self.total = Load()
        self._by_key: defaultdict[str, Load] = defaultdict(Load)

    @contextmanager
    def admit(self, key: str, replies: int, prompt_tokens: int) -> Iterator[None]:
        """Hold room for these replies. Raises ApiError 429, or 400 where they would not fit an idle server."""
        limits = self._limits
        if replies > min(limits.replies, limits.replies_per_key):
            raise bad(f"{replies} replies at once; this server takes {min(limits.replies, limits.replies_per_key)}")
        if prompt_tokens > min(limits.prompt_tokens, limits.prompt_tokens_per_key):
            most = min(limits.prompt_tokens, limits.prompt_tokens_per_key)
            raise bad(f"{prompt_tokens} prompt tokens at once; this server takes {most}")
        mine = self._by_key[key]
        self._check(self.total, replies, prompt_tokens, limits.replies, limits.prompt_tokens, "the server is busy")
        self._check(mine, replies, prompt_tokens, limits.replies_per_key, limits.prompt_tokens_per_key, "this key is busy")
        for load in (self.total, mine):
            load.replies += replies
            load.prompt_tokens += prompt_tokens
        try:
            yield
        finally:
            for load in (self.total, mine):
                load.replies -= replies
                load.prompt_tokens -= prompt_tokens
            if not mine.replies:
                self._by_key.pop(key, None)

    @staticmethod
    def _check(load: Load, replies: int, tokens: int, most_replies: int, most_tokens: int, what: str) -> None:
        if load.replies + replies > most_replies:
            raise overloaded(f"{what}: {load.replies} replies are under way or waiting, at most {most_replies} may be")
        if load.prompt_tokens + tokens > most_tokens:
            raise overloaded(f"{what}: {load.prompt_tokens} prompt tokens are under way or waiting, at most {most_tokens} may be")
