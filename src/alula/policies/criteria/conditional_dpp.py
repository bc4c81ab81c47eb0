"""Tokens that are diverse and matter to the text: a conditional determinantal point process (CDPruner, 2506.10967)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from alula.policies.criteria.base import Criterion
from alula.policies.criteria.candidates import Candidates, Scene

_SMALL = 1e-6


class ConditionalDPP(Criterion):
    """The tokens stay that a greedy search finds to span the largest volume, each stretched by its relevance.

    The kernel is relevance x cosine similarity x relevance (CDPruner, eq. 7), the search that of Chen et al. (2018).
    Published before layer 0, with the relevance of CLIP's two towers: the least similar to the text count most. A
    decoder's host has no text tower, so similarity is that of what the layer is given, to the instruction's tokens.

    Attributes:
        relevance: of tokens "unlike_text" (as published) or "like_text" is large.
    """

    name: Literal["conditional_dpp"] = "conditional_dpp"
    relevance: Literal["unlike_text", "like_text"] = "unlike_text"

    def choose(self, scene: Scene, candidates: Candidates) -> Tensor:
        features = torch.nn.functional.normalize(candidates.gather(scene.hidden).to(torch.float32), dim=-1)
        text, is_text = candidates.instruction()
        words = torch.nn.functional.normalize(scene.hidden.flatten(0, 1)[text].to(torch.float32), dim=-1)
        mean = words.masked_fill(~is_text[..., None], 0).sum(dim=1) / is_text.sum(dim=1, keepdim=True).clamp(min=1)
        similarity = (features @ mean[..., None])[..., 0]
        weight = stretched(-similarity if self.relevance == "unlike_text" else similarity, candidates.real)
        return spanning(weight[:, :, None] * (features @ features.mT) * weight[:, None, :], candidates)


def stretched(scores: Tensor, real: Tensor) -> Tensor:
    """(U, N) scores from 0 to 1 within every group, with the 1e-6 of the published code."""
    least = scores.masked_fill(~real, torch.inf).amin(dim=1, keepdim=True)
    most = scores.masked_fill(~real, -torch.inf).amax(dim=1, keepdim=True)
    return (scores - least + _SMALL) / (most - least).clamp(min=_SMALL)


def spanning(kernel: Tensor, candidates: Candidates) -> Tensor:
    """(U, N) bool: as many candidates as are wanted, greedily so that the determinant of their part of the (U, N, N)
    kernel is largest. Beyond its rank, where nothing is left to gain, the first ones are taken."""
    real, numbers = candidates.real, candidates.numbers
    wanted = candidates.wanted_on_device()
    gain = kernel.diagonal(dim1=1, dim2=2).masked_fill(~real, -torch.inf)
    chosen, spanned = torch.zeros_like(real), kernel.new_zeros(len(kernel), max(candidates.wanted), kernel.shape[1])
    for step in range(max(candidates.wanted)):
        pick = gain.argmax(dim=1, keepdim=True)
        chosen = chosen | ((numbers == pick) & (wanted > step))
        known = spanned[:, :step]
        shared = (known.take_along_dim(pick[:, None], dim=2) * known).sum(dim=1)
        row = kernel.take_along_dim(pick[..., None], dim=1)[:, 0] - shared
        left = gain.take_along_dim(pick, dim=1)
        new = torch.where(left > 0, row / left.clamp(min=1e-30).sqrt(), 0)
        spanned[:, step] = new
        gain = (gain - new.square()).clamp(min=0).masked_fill(~real, -torch.inf)
        gain = gain.masked_fill(chosen | (numbers == pick), -torch.inf)
    return chosen & real
