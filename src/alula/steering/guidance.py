"""Next tokens told against a second run.

Shapes: B batch, T tokens whose logits were asked for, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from alula.errors import UsageError
from alula.seam import Contrast
from alula.seam.dialect import cache_of
from alula.steering.block import Highlight


class Guided(Contrast):
    """``guidance * log p - (guidance - 1) * log p_second`` in the place of logits: classifier-free guidance.

    The second run is a forward of its own with a cache of its own, which rides on the first one's. So `generate` sees
    one batch and draws one token for both runs, and beams, kept caches and drafted tokens need nothing of their own; a
    pair of rows per sample would have to be told to every sampler, and a logits processor is not told of beams.
    """

    def __init__(
        self,
        block: Highlight,
        guidance: float,
        *,
        everywhere: bool = False,
        probability: bool = False,
        plausibility: float = 0.0,
    ) -> None:
        """
        Args:
            block: whose second run it is.
            guidance: 1 would leave the first run's.
            everywhere: also where nothing is highlighted.
            probability: of probabilities, not of their logarithms.
            plausibility: tokens with less than this share of the probability of the likeliest one are out of the
                question (0 to 1).
        """
        self.second: Hashable = block.second
        self._block, self._guidance = block, guidance
        self._is_everywhere, self._of_probabilities, self._plausibility = everywhere, probability, plausibility

    def changed(self, given: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if not self._is_everywhere and not self._block.are_there(given):
            return None
        cache = cache_of(given, where="the model")
        begins = cache is None or not int(cache.get_seq_length())
        if self._of_probabilities and not begins:
            raise UsageError(
                "guidance by probabilities gives numbers that are no logits: one token can be read from them, no more",
                remedy="give max_new_tokens=1, or leave probability=True out",
            )
        return {}

    def combined(self, logits: Tensor, others: Tensor) -> Tensor:
        one, other = (torch.log_softmax(each.float(), dim=-1) for each in (logits, others))
        known = one
        if self._of_probabilities:
            one, other = one.exp(), other.exp()
        score = self._guidance * one - (self._guidance - 1) * other
        if self._plausibility:
            least = known.amax(dim=-1, keepdim=True) + math.log(self._plausibility)
            score = score.masked_fill(known < least, -math.inf)
        return score
