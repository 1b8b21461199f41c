"""Shuffles and shares that can be asked for any place at once: no list of the whole, no state, the same on every machine.

`shuffled` is a permutation of `range(count)` by a Feistel network over the next power of four, walked until it falls inside
(Black and Rogaway, 2002): where window 3,000,000,000 goes costs as much as where window 3 goes. `Shares` deals an endless row
of draws to parts in exact proportion, by a tree of Beatty sequences. Both are integer arithmetic only: a library's random
generator may change between versions, and a run that resumes may not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

ROUNDS = 6


def stable_key(*parts: object) -> int:
    """128 bits that depend on the text of all parts."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")


def shuffled(index: np.ndarray, count: int, key: object) -> np.ndarray:
    """Where each index below `count` goes in the permutation that `key` names; int64."""
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    rounds = [np.uint64(stable_key(key, i) & (2**64 - 1)) for i in range(ROUNDS)]
    x = index.astype(np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():  # a third of the way on average at worst: the domain is below 4 x count
        left, right = x[outside] >> half, x[outside] & mask
        for number in rounds:
            left, right = right, left ^ (_mixed(right ^ number) & mask)
        x[outside] = left << half | right
        outside = x >= np.uint64(count)
    return x.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 on every element."""
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Shares:
    """Draws 0, 1, 2, ... dealt to parts by weight: after any number of draws each part has had its share to within 4 draws.

    Parts pair up lightest first (a Huffman tree); at a node, draw n goes left where floor(n q + offset) rises. Each level adds
    less than one draw and passes on its own error times q, which for a pair is 2/3 at most: below 3, and 4 at a leaf.
    Weights are exact: floats count as their shortest decimals.
    """

    def __init__(self, weights: Sequence[float | Fraction], *, key: object = 0) -> None:
        exact = [w if isinstance(w, Fraction) else Fraction(str(w)) for w in weights]
        if not exact or any(w <= 0 for w in exact):
            raise ValueError(f"weights must be positive, got {[float(w) for w in exact]}")
        whole = lcm(*(w.denominator for w in exact))
        self.weights = [int(w * whole) for w in exact]
        self.parts = len(exact)
        # A node is [left, right, weight left, weight of both, offset below the latter]; a leaf is its part's number.
        queue: list[tuple[int, int, object]] = sorted((w, i, i) for i, w in enumerate(self.weights))
        number = self.parts
        while len(queue) > 1:
            (light, _, left), (heavy, _, right), *queue = queue
            both = light + heavy
            queue = sorted(
                [*queue, (both, number, (left, right, light, both, stable_key(key, number) % both))], key=lambda x: x[:2]
            )
            number += 1
        self._tree = queue[0][2]

    def deal(self, draw: int) -> tuple[int, int]:
        """(the part that this draw goes to, how many earlier draws went there)."""
        node = self._tree
        while isinstance(node, tuple):
            left, right, share, both, offset = node
            before = (draw * share + offset) // both
            if ((draw + 1) * share + offset) // both > before:
                node, draw = left, before
            else:
                node, draw = right, draw - before
        assert isinstance(node, int)
        return node, draw

    def dealt(self, draws: int) -> list[int]:
        """How many of the first `draws` draws each part gets."""
        counts = [0] * self.parts
        todo = [(self._tree, draws)]
        while todo:
            node, n = todo.pop()
            if isinstance(node, tuple):
                left, right, share, both, offset = node
                gone = (n * share + offset) // both
                todo += [(left, gone), (right, n - gone)]
            else:
                assert isinstance(node, int)
                counts[node] = n
        return counts
