"""The search for the largest saving."""

from __future__ import annotations

from collections.abc import Callable


def largest(count: int, within: Callable[[int], bool]) -> int | None:
    """The last of the amounts 0 to ``count - 1`` that is within the budget, by bisection; None where none is.

    Skill is taken to fall with the amount. Where noise makes it rise again, what is found is an amount that is within,
    the next larger of which is not.

    Args:
        within: asked of some ``log2(count + 1)`` amounts, each once.
    """
    low, high = -1, count
    while high - low > 1:
        middle = (low + high) // 2
        if within(middle):
            low = middle
        else:
            high = middle
    return None if low < 0 else low
