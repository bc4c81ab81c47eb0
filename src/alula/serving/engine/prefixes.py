"""Caches of finished prompts and answers, for turns that go on where they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from alula.seam.joining import forked
from alula.serving.engine.resident import Resident

_LEAST = 8
"""tokens that are worth to be found again"""


@dataclass(eq=False)
class _Kept:
    resident: Resident
    keys: list[Any]
    size: int
    cache: Any


class Prefixes:
    """What was computed, by model and by what tells its tokens apart; of more than there is room for, what was asked
    for last.

    Args:
        tokens: that are kept at most, over all.
        memory: bytes that these take at most.
    """

    def __init__(self, tokens: int, memory: int) -> None:
        self._most_tokens, self._most_bytes = tokens, memory
        self._kept: list[_Kept] = []  # what was asked for last is last

    @property
    def tokens(self) -> int:
        """How many are kept."""
        return sum(len(each.keys) for each in self._kept)

    @property
    def bytes(self) -> int:
        """What their caches take."""
        return sum(each.size for each in self._kept)

    def keep(self, resident: Resident, keys: list[Any], size: int, made: Callable[[], Any]) -> None:
        """Keep a cache, whose tokens have these keys, in the place of those that it goes on from. What it takes the
        place of goes before it is made, so that there is never more than may be.

        Args:
            size: bytes that it takes.
            made: gives it.
        """
        if not (_LEAST <= len(keys) <= self._most_tokens and size <= self._most_bytes):
            return
        self._kept = [
            each
            for each in self._kept
            if each.resident is not resident or len(each.keys) > len(keys) or each.keys != keys[: len(each.keys)]
        ]
        while self.tokens + len(keys) > self._most_tokens or self.bytes + size > self._most_bytes:
            del self._kept[0]
        self._kept.append(_Kept(resident, keys, size, made()))

    def found(self, resident: Resident, keys: Sequence[Any]) -> tuple[Any, int]:
        """A cache that begins as a prompt does, and of how many of its tokens; all but the last at most."""
        best, most = None, 0
        for each in self._kept:
            if each.resident is resident:
                length = _common(each.keys, keys)
                if length > most:
                    best, most = each, length
        most = min(most, len(keys) - 1)
        if best is None or most < _LEAST:
            return None, 0
        self._kept.remove(best)
        self._kept.append(best)
        return best.cache, most

    def taken(self, cache: Any, length: int) -> Any:
        """The first tokens of a cache that was found, to go on from."""
        return forked(cache, length)

    def forget(self, resident: Resident) -> None:
        """Let go of what a model left."""
        self._kept = [each for each in self._kept if each.resident is not resident]


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many first ones two sequences have in common."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(place for place in range(length) if one[place] != other[place])
