"""How far numbers that users give may go."""

from __future__ import annotations

from alula.errors import UsageError

MAX_SEED = 2**32 - 1
"""the largest that every random generator takes"""
MAX_ITEMS = 1_000_000
"""questions or samples of one task: all are made before the first is asked"""


def check_seed(seed: int, where: str = "seed") -> None:
    """Raise a UsageError unless every random generator takes ``seed``."""
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"{seed} is not between 0 and {MAX_SEED}", where=where)


def check_count(count: int, where: str, least: int = 1) -> None:
    """Raise a UsageError unless so many questions or samples can be asked for."""
    if count < least:
        raise UsageError(f"must be at least {least}, not {count}", where=where)
    if count > MAX_ITEMS:
        raise UsageError(f"{count} is more than the {MAX_ITEMS:,} that are taken at most", where=where)
