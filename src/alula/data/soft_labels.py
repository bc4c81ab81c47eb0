"""Soft labels: for each token of an answer, the distribution that is to be learnt in place of the token.

A message of a sample carries them under the key ``"soft"``, and the collator puts those of a batch beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS, CANDIDATES, LOGPROBS, WEIGHTS = KEYS = (
    "soft_positions",
    "soft_candidates",
    "soft_logprobs",
    "soft_weights",
)
"""Keys of a batch that are for a loss, not for the model."""


@dataclass(frozen=True)
class SoftLabels:
    """A teacher's distributions over one answer of T tokens, each by its K likeliest candidates.

    Attributes:
        ids: (T,) int64, the answer's tokens, the one that ends it included.
        candidates: (T, K) int64, token ids.
        logprobs: (T, K) float32, natural logarithms of their probabilities; what they leave to 1 belongs to all others
            together.
    """

    ids: Tensor
    candidates: Tensor
    logprobs: Tensor


def joined(held: Sequence[tuple[int, SoftLabels]]) -> dict[str, Tensor]:
    """The soft labels of a batch, whose logits are read as (B * L, V); nothing without any.

    Args:
        held: per answer the flat position of its first token, b * L + its place in the padded row.

    Returns:
        ``soft_positions`` (N,) int64: flat positions of the logits that predict the N tokens; ``soft_candidates``
        (N, K) int64, ``soft_logprobs`` (N, K) float32; ``soft_weights`` (N,) float32: one over the tokens of the
        token's answer, so that a weighted sum over tokens is a sum over answers.
    """
    if not held:
        return {}
    sizes = [len(labels.ids) for _, labels in held]
    return {
        # the logits of a token are those of the place before it
        POSITIONS: torch.cat([torch.arange(size) + first - 1 for size, (first, _) in zip(sizes, held, strict=True)]),
        CANDIDATES: torch.cat([labels.candidates for _, labels in held]),
        LOGPROBS: torch.cat([labels.logprobs for _, labels in held]),
        WEIGHTS: torch.cat([torch.full((size,), 1 / size) for size in sizes]),
    }
