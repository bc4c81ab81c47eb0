"""Tokens that duplicate none of a few pivots (DART, arXiv 2502.11494)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from alula.policies.base import Stand
from alula.policies.criteria.base import Criterion
from alula.policies.criteria.candidates import Candidates, Scene
from alula.seam import LayerView
from alula.settings import Int
from alula.tokens import on_device


class Duplicates(Criterion):
    """Pivots stay, and for each of them the tokens least similar to it: those that duplicate it leave.

    Pivots are the tokens of the group, and of its instruction, whose keys in the layer before have the largest L1 norm,
    all heads together. One after the other they take equally many of the tokens that are left, the least similar by
    the cosine of normed hidden states (DART, section 3). Image pivots stay and go first, by their norm; the published
    code visits pivots in the order of a set of Python's, and keeps a few more or less than it is asked for.

    Attributes:
        image_pivots, text_pivots: how many.
    """

    name: Literal["duplicates"] = "duplicates"
    image_pivots: Int = Field(default=4, ge=1)
    text_pivots: Int = Field(default=4, ge=0)

    @property
    def reads_before(self) -> bool:
        return True

    def place(self, stand: Stand, layer: int) -> None:
        stand.heads(layer - 1, _Reader(stand.owner))

    def choose(self, scene: Scene, candidates: Candidates) -> Tensor:
        norms = scene.noted("key norms").flatten()
        norm, states = scene.view.ctx.anatomy.final_norm, scene.hidden
        states = torch.nn.functional.normalize((states if norm is None else norm(states)).to(torch.float32), dim=-1)
        of_images = norms[candidates.index.clamp(max=len(norms) - 1)].masked_fill(~candidates.real, -torch.inf)
        text, is_text = candidates.instruction()
        of_text = norms[text].masked_fill(~is_text, -torch.inf)
        counts = [min(self.image_pivots, wanted) for wanted in candidates.wanted]
        more = [min(self.text_pivots, len(words)) for words in candidates.instructions]
        image = of_images.topk(max(counts), dim=1).indices
        first = torch.arange(image.shape[1], device=image.device) < on_device(np.array(counts), image.device)[:, None]
        taken = torch.zeros_like(candidates.real).scatter(1, image, first)
        words = text.gather(1, of_text.topk(max(more), dim=1).indices)
        pivots = torch.cat([candidates.index.gather(1, image), words], dim=1).clamp(max=len(norms) - 1)
        features = states.flatten(0, 1)
        similarity = features[pivots] @ candidates.gather(states).mT
        each = [
            _shares(wanted - count, count, words_, image.shape[1], words.shape[1])
            for wanted, count, words_ in zip(candidates.wanted, counts, more, strict=True)
        ]
        return far_from(similarity, taken, on_device(np.array(each), image.device), candidates.real)


class _Reader:
    """Notes the L1 norms of new tokens' keys."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def on_heads(self, view: LayerView, query: Tensor, key: Tensor, scaling: float) -> None:
        if view.ctx.new_media:
            norms = key.to(torch.float32).abs().sum(dim=(1, 3))
            view.ctx.memo[self.owner, "key norms", view.layer] = view.spread(norms)


def _shares(rest: int, image: int, text: int, image_places: int, text_places: int) -> list[int]:
    """How many tokens every pivot takes of the rest; none where there is no pivot."""
    pivots = max(image + text, 1)
    taken = [rest // pivots + (pivot < rest % pivots) for pivot in range(image + text)]
    return taken[:image] + [0] * (image_places - image) + taken[image:] + [0] * (text_places - text)


def far_from(similarity: Tensor, taken: Tensor, each: Tensor, real: Tensor) -> Tensor:
    """(U, N) bool: those taken already, and what pivots take one after the other: the least similar that is left.

    Args:
        similarity: (U, P, N) of pivots and candidates.
        taken: (U, N) bool.
        each: (U, P) how many every pivot takes.
        real: (U, N) bool: the candidate is there.
    """
    first = torch.arange(taken.shape[1], device=taken.device)
    for pivot in range(similarity.shape[1]):
        order = similarity[:, pivot].masked_fill(taken | ~real, torch.inf).argsort(dim=1, stable=True)
        taken = taken | torch.zeros_like(taken).scatter(1, order, first < each[:, pivot, None])
    return taken & real
