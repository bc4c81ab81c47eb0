"""How far numbers that users give may go."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alula.errors import UsageError

MAX_SEED = 2**31 - 1
"""the largest that recipes and every random generator take"""
MAX_ITEMS = 1_000_000
"""questions or samples of one task: all are made before the first is asked"""
DEFAULT_MAX_PIXELS = 89_478_485
"""Largest image accepted by default, in pixels: 256 MiB of 24-bit colour, Pillow's own warning level."""
HARD_MAX_PIXELS = 178_956_970
"""Pillow refuses to open anything larger, whatever alula is told."""


def check_seed(seed: int, where: str = "seed") -> None:
    """Raise a UsageError unless recipes and every random generator take ``seed``."""
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"{seed} is not between 0 and {MAX_SEED}", where=where)


def check_training(seeds: Sequence[int], steps: float) -> None:
    """Raise a UsageError unless trainings can be repeated over ``seeds``, their steps times ``steps``."""
    if not seeds or not (steps > 0 and math.isfinite(steps)):
        raise UsageError("at least one seed is needed, and a factor on the steps above 0")
    for seed in seeds:
        check_seed(seed, "--seeds")


def check_count(count: int, where: str, least: int = 1) -> None:
    """Raise a UsageError unless so many questions or samples can be asked for."""
    if count < least:
        raise UsageError(f"must be at least {least}, not {count}", where=where)
    if count > MAX_ITEMS:
        raise UsageError(f"{count} is more than the {MAX_ITEMS:,} that are taken at most", where=where)
