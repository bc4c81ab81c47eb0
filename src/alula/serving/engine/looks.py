"""Where media lie among a prompt's tokens, how many are kept of them, and where in them a new token looked.

Shapes: B batch, H heads, K all tokens so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alula.anatomy import Anatomy
from alula.seam import LayerView, find, marked
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


class Gaze:
    """Reads the attention of the last token of every forward to the media of one prompt."""

    def __init__(self, prepared: Prepared, anatomy: Anatomy, *, is_cut: bool) -> None:
        """
        Args:
            is_cut: tokens are taken out of layers.
        """
        self._is_cut = is_cut
        self._items = items_of(prepared)
        self._grids = _grids(prepared, anatomy, self._items)
        self._sum: Tensor | None = None
        self._layers = 0

    def queries(self, view: LayerView) -> Tensor | None:
        """The last token."""
        batch, count = view.ctx.tokens.shape
        return torch.full((batch, 1), count - 1, device=view.ctx.tokens.device)

    def on_weights(self, view: LayerView, weights: Tensor) -> None:
        """Take a layer's."""
        here = weights[0, :, 0].float().mean(dim=0)
        self._sum = here if self._sum is None else self._sum + here
        self._layers += 1

    def looks(self) -> list[Look]:
        """Where the last token looked, media in order; what is read next belongs to the next token."""
        if self._sum is None:
            return []
        read = (self._sum / self._layers).tolist()
        shares = [None if self._is_cut and not share else share for share in read]
        self._sum, self._layers = None, 0
        return [
            Look(item, grid, tuple(shares[place] for place in places.tolist()))
            for (item, places), grid in zip(self._items, self._grids, strict=True)
        ]


@contextmanager
def gazing(model: Any, gaze: Gaze) -> Iterator[None]:
    """Inside, `gaze` reads the forwards of `model` that this thread begins.

    Raises:
        HostError: the decoder's attention cannot be read.
    """
    seam, mark = find(model), object()
    assert seam is not None
    try:
        for layer in range(seam.anatomy.num_layers):
            seam.request_weights(layer, gaze, mark=mark)
        with marked(mark):
            yield
    finally:
        seam.forget(mark)
