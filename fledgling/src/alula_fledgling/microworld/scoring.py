"""Whether an answer is right: exact match after the differences no reader would care about are gone."""

from __future__ import annotations

import re

_SPACE = re.compile(r"\s+")


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return _SPACE.sub(" ", text).strip().lower().rstrip(".").rstrip()


def score(family: str, gold: str, answer: str) -> bool:
    """Whether ``answer`` is right for a target of ``family`` whose gold answer is ``gold``.

    Captions match as sets: every thing named with its size, colour, shape and place, nothing else, in any order. All
    other families need the normalised gold answer itself.
    """
    gold, answer = normalise(gold), normalise(answer)
    if family == "caption":
        return _things(gold) == _things(answer)
    return gold == answer


def _things(caption: str) -> list[str]:
    # sorted rather than a set: naming a thing twice is wrong
    return sorted(part.strip() for part in re.split(r",| and ", caption) if part.strip())
