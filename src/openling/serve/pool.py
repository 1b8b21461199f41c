"""Which pages and slots are free, and how many hold each of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from openling.errors import Failure


class Pool:
    """Numbers 0 .. size - 1 with reference counts. on_take and on_free are told of each number that changes hands.

    Numbers that were given back last are taken first: they are the likeliest to be in a processor's cache.
    """

    def __init__(
        self, size: int, *, on_take: Callable[[int], None] | None = None, on_free: Callable[[int], None] | None = None
    ) -> None:
        self.size = size
        self.references = [0] * size
        self._free = list(range(size - 1, -1, -1))
        self._on_take, self._on_free = on_take, on_free

    @property
    def free(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self) -> int:
        """A free number, held once by the caller; IndexError if there is none."""
        number = self._free.pop()
        self.references[number] = 1
        if self._on_take is not None:
            self._on_take(number)
        return number

    def share(self, number: int) -> None:
        """One more holder of a number that somebody holds."""
        if self.references[number] < 1:
            raise Failure("a free page or slot was shared", value=number, expected="a number that is in use")
        self.references[number] += 1

    def release(self, number: int) -> None:
        """One holder less; the last one frees it."""
        if self.references[number] < 1:
            raise Failure("a page or slot was given back twice", value=number, expected="a number that is in use")
        self.references[number] -= 1
        if not self.references[number]:
            if self._on_free is not None:
                self._on_free(number)
            self._free.append(number)

    def check(self, what: str, owners: Iterable[int]) -> None:
        """Raise Failure unless free and held numbers are the whole pool, and `owners` hold each as often as it counts."""
        held = Counter(owners)
        wrong = [i for i, count in enumerate(self.references) if count != held[i]]
        free = set(self._free)
        if wrong or len(free) != len(self._free) or len(free) + len(held) != self.size or free & held.keys():
            raise Failure(
                f"the pool of {what} has leaked",
                value=f"{len(free)} free + {len(held)} owned of {self.size}; counts differ for {wrong[:8]}",
                expected="free + owned = all, every reference with an owner",
            )
