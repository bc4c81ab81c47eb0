"""Caches of finished prompts and answers, for turns that go on where they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alula.seam.joining import forked, is_forkable
from alula.serving.engine.residents import Resident

_LEAST = 8
"""tokens that are worth to be found again"""


@dataclass(eq=False)
class _Kept:
    resident: Resident
    keys: list[Any]
    cache: Any


class Prefixes:
    """What was computed, by model and by what tells its tokens apart; of more than there is room for, what was asked
    for last.

    Args:
        room: tokens that are kept.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: list[_Kept] = []  # what was asked for last is last

    @property
    def tokens(self) -> int:
        """How many are kept."""
        return sum(len(each.keys) for each in self._kept)

    def takes(self, length: int) -> bool:
        """Whether a cache of so many tokens would be kept."""
        return _LEAST <= length <= self._room

    def keep(self, resident: Resident, keys: list[Any], cache: Any) -> None:
        """Keep a cache, whose tokens have these keys, in the place of those that it goes on from."""
        if not self.takes(len(keys)) or not is_forkable(cache):
            return
        self._kept = [
            each
            for each in self._kept
            if each.resident is not resident or len(each.keys) > len(keys) or each.keys != keys[: len(each.keys)]
        ]
        self._kept.append(_Kept(resident, keys, cache))
        while self.tokens > self._room:
            del self._kept[0]

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
