"""Whether drafting pays: measured, per size of the batch, against steps without drafts."""

from __future__ import annotations

from dataclasses import dataclass

# Steps of each kind before the first comparison, how often the losing kind is tried again, weight of the newest measurement.
FIRST_STEPS = 4
TRY_AGAIN = 128
NEWEST = 0.1


@dataclass
class _Rate:
    tokens_per_second: float = 0.0
    steps: int = 0

    def add(self, rate: float) -> None:
        """The very first step compiles and captures: not counted. Later outliers of that kind count as half the usual rate."""
        if self.steps:
            rate = max(rate, self.tokens_per_second / 2)
            self.tokens_per_second += (rate - self.tokens_per_second) * max(NEWEST, 1 / self.steps)
        self.steps += 1


class Payoff:
    """Remembers the tokens per second of decoding steps with and without drafts, by batch size rounded up to a power of two."""

    def __init__(self) -> None:
        self._rates: dict[int, tuple[_Rate, _Rate]] = {}
        self._asked = 0

    def worth_it(self, batch: int) -> bool:
        """Whether the next step of so many sequences should be prepared with drafts."""
        self._asked += 1
        plain, drafted = self._of(batch)
        if drafted.steps < FIRST_STEPS or plain.steps < FIRST_STEPS:
            return drafted.steps < FIRST_STEPS
        pays = drafted.tokens_per_second > plain.tokens_per_second
        return not pays if self._asked % TRY_AGAIN == 0 else pays

    def add(self, batch: int, *, drafted: bool, tokens: int, seconds: float) -> None:
        """A decoding step made so many tokens in so many seconds."""
        self._of(batch)[drafted].add(tokens / max(seconds, 1e-9))

    def _of(self, batch: int) -> tuple[_Rate, _Rate]:
        return self._rates.setdefault(max(batch - 1, 0).bit_length(), (_Rate(), _Rate()))
