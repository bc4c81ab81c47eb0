"""The attention of new tokens, read while they are computed.

Shapes: B batch, H heads, K all tokens so far.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alula.seam import LayerView, find, marked


class Gaze:
    """Reads the attention of the last tokens of a forward: the mean over layers and heads."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._layers = 0

    def queries(self, view: LayerView) -> Tensor | None:
        """The last token of each sample."""
        batch, count = view.ctx.tokens.shape
        return torch.full((batch, 1), count - 1, device=view.ctx.tokens.device)

    def on_weights(self, view: LayerView, weights: Tensor) -> None:
        """Take a layer's."""
        here = weights[:, :, 0].float().mean(dim=1)
        if self._sum is None or view.layer == 0:  # a forward that failed may have left a part
            self._sum, self._layers = here, 1
        else:
            self._sum, self._layers = self._sum + here, self._layers + 1

    def taken(self) -> list[list[float]]:
        """(B, K) what was read; what is read next belongs to the next tokens."""
        found = [] if self._sum is None else (self._sum / self._layers).tolist()
        self._sum, self._layers = None, 0
        return found


@contextmanager
def gazing(model: Any, gaze: Gaze) -> Iterator[None]:
    """Inside, `gaze` reads the forwards of `model` that this thread begins.

    Raises:
        HostError: the decoder's attention cannot be read.
    """
    seam, mark = find(model), object()
    assert seam is not None
    try:
        ask(model, gaze, mark)
        with marked(mark):
            yield
    finally:
        seam.forget(mark)


def ask(model: Any, gaze: Gaze, mark: Hashable | None = None) -> None:
    """Have `gaze` read the forwards of `model`, or those of them that carry a mark.

    Raises:
        HostError: the decoder's attention cannot be read.
    """
    seam = find(model)
    assert seam is not None
    for layer in range(seam.anatomy.num_layers):
        seam.request_weights(layer, gaze, mark=mark)
