"""Prompt Highlighter: attention is shifted towards what is highlighted, and next tokens are told against a second run
that hardly sees it.

Zhang et al., "Prompt Highlighter: Interactive Control for Multi-Modal LLMs", CVPR 2024, arXiv 2312.04302, as its code
has it: the shift is added to scores that are divided by sqrt(d) already, in all layers, heads and queries.

Shapes: B batch, S new tokens, K all tokens so far, d width of the stream.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor

from alula.errors import HostError, UsageError
from alula.seam import Bias, LayerView, Phase, Point
from alula.settings import Bool, Number, Settings
from alula.steering.block import Highlight
from alula.steering.guidance import Guided

STRENGTH, GUIDANCE = math.log(2), 1.3


class Shift(Settings):
    """Prompt Highlighter. Its ``strength`` is log(beta) of the paper and added to the attention logits of highlighted
    tokens (of a weight w, w times as much), so that their attention is beta times what it was, before all is scaled to
    a sum of 1; its ``guidance`` is gamma. In the second run ``-(strength + margin)`` is added; where attention turns
    away (a negative strength or weight), both have the other sign.

    Attributes:
        embedding: alpha: what the embeddings of highlighted tokens are multiplied by in the second run. Where weights
            are negative they stay. RMS norms undo much of it for embeddings of large norm, such as those of images.
        margin: how much further attention is shifted in the second run than in the first.
        probability: guidance of probabilities instead of their logarithms, as the paper's benchmarks of a single token
            have it: only for the token of the highest score, and only for one.
    """

    embedding: Annotated[Number, Field(ge=0)] = 0.01
    margin: Annotated[Number, Field(ge=0)] = 2.0
    probability: Bool = False

    def place(self, block: Highlight, strength: float | None, guidance: float | None) -> None:
        strength = STRENGTH if strength is None else finite("strength", strength)
        guidance = GUIDANCE if guidance is None else finite("guidance", guidance)
        if guidance == 1 and self.model_fields_set:
            raise UsageError(
                f"there is no second run under guidance=1, and {', '.join(sorted(self.model_fields_set))} is of it",
                remedy="give another guidance, or Shift() as it is",
            )
        if guidance == 1 and not strength:
            raise UsageError("strength=0 and guidance=1 do nothing", remedy="give one of them another value")
        if strength:
            shift(block, strength, second=False)
        if guidance == 1:
            return
        block.seam.request_contrast(Guided(block, guidance, probability=self.probability), mark=block.first)
        sign = -1 if strength < 0 else 1
        if further := -(strength + sign * self.margin):
            shift(block, further, second=True)
        if self.embedding != 1:
            self._scale_embeddings(block, sign)

    def _scale_embeddings(self, block: Highlight, sign: int) -> None:
        if not block.anatomy.rotates:
            raise HostError(
                f"positions are part of the embeddings of {type(block.anatomy.decoder).__name__}, which the second run "
                "scales",
                remedy="give by=Shift(embedding=1), which leaves them as they are, or guidance=1",
            )

        def scale(view: LayerView, hidden: Tensor) -> Tensor | None:
            weights = block.of_new(view.ctx)
            if weights is None:
                return None
            factor = 1 + (self.embedding - 1) * (sign * view.pick(weights)).clamp(0, 1)
            return hidden * factor[..., None].to(hidden)

        block.seam.on(Point.BLOCK_INPUT, 0, scale, phase=Phase.EDIT, owner=block.name, mark=block.second)


class _Added(Bias):
    """A weight times a number for every key, the same tensor in all layers of a forward."""

    def __init__(self, block: Highlight, amount: float) -> None:
        self._block, self._amount = block, amount

    def key_bias(self, view: LayerView) -> Tensor | None:
        weights = self._block.of(view.ctx)
        return None if weights is None else view.ctx.once(_product, weights, self._amount)


def _product(weights: Tensor, amount: float) -> Tensor:
    return (amount * weights)[:, None, None]


def shift(block: Highlight, amount: float, *, second: bool) -> None:
    """Add a number to the attention logits of highlighted tokens, of a weight w, w times as much, in first or second
    runs."""
    added = _Added(block, amount)
    for layer in range(block.anatomy.num_layers):
        block.seam.request_bias(layer, added, mark=block.second if second else block.first)


def finite(name: str, value: object) -> float:
    """A number that was given for an option.

    Raises:
        UsageError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} is a finite number, not {value!r}")
    return float(value)
