"""Seeded choices that are the same on every platform, Python version and process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import MutableSequence, Sequence
from typing import TypeVar

T = TypeVar("T")

HELD_OUT_ONE_IN = 8
"""One content in this many belongs to the held-out split."""


class Draw:
    """A stream of choices that is a pure function of its key.

    Only ``random.Random.random`` is used: it is the one method whose stream Python promises to keep between versions.

    Args:
        key: anything with a stable ``str``; the parts are joined, so ``Draw("text", 0, 7)`` is item 7 of seed 0.
    """

    __slots__ = ("_random",)

    def __init__(self, *key: object) -> None:
        self._random = random.Random("|".join(map(str, key))).random

    def below(self, n: int) -> int:
        """A number in ``0..n-1``."""
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """A number in ``low..high``, both ends included."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def choice(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def shuffle(self, values: MutableSequence[T]) -> None:
        for last in range(len(values) - 1, 0, -1):
            other = self.below(last + 1)
            values[last], values[other] = values[other], values[last]

    def sample(self, options: Sequence[T], k: int) -> list[T]:
        """``k`` different options in random order."""
        pool = list(options)
        for first in range(k):
            other = first + self.below(len(pool) - first)
            pool[first], pool[other] = pool[other], pool[first]
        return pool[:k]


def split_of(*content: object) -> str:
    """Which split a content belongs to: ``"test"`` for one in eight, by a hash of the content alone.

    A content decides its split whoever draws it and with whatever seed, so the splits are disjoint by construction.
    """
    digest = hashlib.blake2b("|".join(map(str, content)).encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0 else "train"
