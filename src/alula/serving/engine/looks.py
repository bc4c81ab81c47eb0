"""Where media lie among a prompt's tokens, how many are kept of them, and where in them a new token looked.

Shapes: K all tokens so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from alula.anatomy import Anatomy
from alula.serving.engine.events import ItemPreview, Look
from alula.serving.engine.prompts import Prepared
from alula.tokens import UNKNOWN, Modality


def items_of(prepared: Prepared) -> list[tuple[int, np.ndarray]]:
    """The media of a prompt in order with the places of their tokens; one, -1, for all where these are not known."""
    found = prepared.items
    if (found == UNKNOWN).any():
        return [(-1, (found != -1).nonzero()[0])]
    return [(int(item), (found == item).nonzero()[0]) for item in np.unique(found[found >= 0])]


def previews(prepared: Prepared, anatomy: Anatomy, budget: int | None) -> list[ItemPreview]:
    """What the media of a prompt take.

    Args:
        budget: tokens that each has at most.
    """
    items = items_of(prepared)
    given = _grids(prepared, anatomy, items)
    return [
        ItemPreview(len(places), len(places) if budget is None else min(budget, len(places)), grid)
        for (_, places), grid in zip(items, given, strict=True)
    ]


def _grids(prepared: Prepared, anatomy: Anatomy, items: list[tuple[int, np.ndarray]]) -> list[tuple[int, int] | None]:
    """Rows and columns of each medium's tokens, as the host is told them, or of images in a square."""
    told = anatomy.shapes(prepared.inputs).get(Modality.IMAGE, []) if items else []
    grids: list[tuple[int, int] | None] = []
    for number, (item, places) in enumerate(items):
        side = math.isqrt(len(places))
        if item < 0:
            grids.append(None)
        elif len(told) == len(items):
            rows, columns = (int(each) for each in told[number])
            grids.append((rows, columns) if rows * columns == len(places) else None)
        else:
            is_image = prepared.kinds[item] == "image"
            grids.append((side, side) if is_image and side * side == len(places) else None)
    return grids


class Looking:
    """Tells of new tokens where they looked in the media of one prompt."""

    def __init__(self, prepared: Prepared, anatomy: Anatomy, *, is_cut: bool = False) -> None:
        """
        Args:
            is_cut: tokens are taken out of layers.
        """
        self._is_cut = is_cut
        self._items = items_of(prepared)
        self._grids = _grids(prepared, anatomy, self._items)

    def looks(self, read: Sequence[float]) -> list[Look]:
        """Of a token, media in order.

        Args:
            read: (K,) shares of its attention, from the prompt's first token on.
        """
        shares = [None if self._is_cut and not share else share for share in read]
        return [
            Look(item, grid, tuple(shares[place] for place in places.tolist()))
            for (item, places), grid in zip(self._items, self._grids, strict=True)
        ]
