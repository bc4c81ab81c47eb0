"""Seeded choices that are the same on every machine, platform, Python and numpy version.

Shuffling is a function here: where an index lands is computed, not stored, and cheap at any position of any size of
data, so nothing keeps a generator's state.
"""

from __future__ import annotations

import random
from collections.abc import MutableSequence, Sequence
from typing import TypeVar

T = TypeVar("T")

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mixed(*numbers: int) -> int:
    """64 well-mixed bits that depend on all of ``numbers`` (SplitMix64's finaliser, chained; Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def shuffled_index(index: int, size: int, *key: int) -> int:
    """Where ``index`` goes in the permutation of ``0..size-1`` named by ``key``; constant memory at any size.

    A Feistel network over the next even number of bits, walked until it lands inside (Black and Rogaway 2002).
    """
    if not 0 <= index < size:
        raise IndexError(index)
    half = max(2, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    key_bits = mixed(*key, size)
    while True:
        left, right = index >> half, index & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mixed(key_bits, turn, right) & low)
        index = (left << half) | right
        if index < size:
            return index


def shuffled_runs(index: int, size: int, length: int, *key: int) -> int:
    """The same where runs of ``length`` neighbours go together, in order. They are counted from the first sample on, so
    groups of that length stay whole; what is left over behind the last is a short run, at a place that is drawn."""
    if length == 1:
        return shuffled_index(index, size, *key)
    whole, rest = divmod(size, length)
    place = mixed(*key, length) % (whole + 1) * length
    if place <= index < place + rest:
        return whole * length + index - place
    run, within = divmod(index if index < place else index - rest, length)
    return shuffled_index(run, whole, *key) * length + within


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
