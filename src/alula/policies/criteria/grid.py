"""Tokens evenly spaced over the image."""

from __future__ import annotations

import functools
import math
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alula.policies.criteria.base import Criterion
from alula.policies.criteria.candidates import Candidates, Scene


class Grid(Criterion):
    """The tokens stay that stand in the middle of equal parts of the image.

    As many parts as tokens are wanted, in rows and columns where the host is told those of its images or their tokens
    are a square; else, and in stages behind the first, they are evenly spaced in reading order. A film's frames stand
    below one another.
    """

    name: Literal["grid"] = "grid"
    is_of_images: ClassVar[bool] = True

    def choose(self, scene: Scene, candidates: Candidates) -> Tensor:
        _, stays = parts(candidates)
        return stays


def parts(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """Every image in as many parts as tokens of it are wanted.

    Returns:
        (U, N) which candidate stands in the middle of a candidate's part; (U, N) bool which do.
    """
    middles = []
    for group, count, wanted in zip(candidates.groups, candidates.counts, candidates.wanted, strict=True):
        shape = (group.rows, group.columns) if count == group.size else (1, count)
        middles.append(_middles(*shape, wanted))
    into = candidates.table(middles)
    return into, (into == candidates.numbers) & candidates.real


@functools.lru_cache(maxsize=256)
def _middles(rows: int, columns: int, count: int) -> NDArray[np.int64]:
    """(rows * columns) which token stands in the middle of the part that each is in, of `count` parts."""
    bands = min(max(round(math.sqrt(count * rows / columns)), math.ceil(count / columns), 1), rows, count)
    middles = np.empty((rows, columns), dtype=np.int64)
    for band in range(bands):
        top, bottom = _bounds(band, bands, rows)
        cells = (band + 1) * count // bands - band * count // bands
        for cell in range(cells):
            left, right = _bounds(cell, cells, columns)
            middles[top:bottom, left:right] = (top + bottom - 1) // 2 * columns + (left + right - 1) // 2
    return middles.flatten()


def _bounds(part: int, parts: int, size: int) -> tuple[int, int]:
    """Where a part begins, and the next one."""
    return -(-part * size // parts), -(-(part + 1) * size // parts)
