"""What the vision tower looks at: attention of its class token (VisionZip), or likeness to it (2409.01162)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from alula.errors import HostError, UsageError
from alula.policies.base import Stand
from alula.policies.criteria.base import Scored
from alula.policies.criteria.candidates import Candidates, Layout, Scene
from alula.tokens import UNKNOWN, on_device


class _OfTower(Scored):
    """By scores of the tower's patches in the layer that the host takes its features from; where several patches make
    one token, by their mean."""

    def scores(self, scene: Scene, candidates: Candidates) -> Tensor:
        ctx = scene.view.ctx
        seen = (ctx.of_tower.get() or {}).get(scene.owner)
        if seen is None:
            raise UsageError(
                "the vision tower was not seen to make the images of this forward",
                where=self.name,
                remedy="have the host make them from pixels under the policy, and not beforehand",
            )
        layout: Layout = ctx.once(Layout.of, ctx.tokens)
        index, repeats = _places(layout, len(seen))
        patches = seen.repeat_interleave(repeats, dim=0) if repeats > 1 else seen
        patches = _per_token(patches, index.shape[1])
        every = patches.new_zeros(ctx.tokens.shape).flatten()
        at = on_device(index, every.device).flatten()
        return candidates.gather(every.scatter(0, at, patches.flatten()).view(ctx.tokens.shape))


class TowerAttention(_OfTower):
    """The tokens stay that the tower's class token attends to most, mean over heads; in a tower without one, that its
    patches attend to most, mean over these too."""

    name: Literal["tower_attention"] = "tower_attention"

    def place(self, stand: Stand, layer: int) -> None:
        stand.tower(_Attention(stand.anatomy.tower_heads))


class TowerSimilarity(_OfTower):
    """The tokens stay whose patches are most similar to the tower's class token, by cosine; in a tower without one, to
    the mean of its patches."""

    name: Literal["tower_similarity"] = "tower_similarity"

    def place(self, stand: Stand, layer: int) -> None:
        stand.tower(_Similarity())


def _extra(count: int) -> int:
    """How many of so many positions stand in front of the patches, which are a square."""
    return count - math.isqrt(count) ** 2


class _Attention:
    """Scores patches by attention.

    Args:
        heads: of the tower.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def on_tower(self, states: Tensor, query: Tensor | None, key: Tensor | None) -> Tensor:
        """(N, patches) from (N, positions, width) states, queries and keys."""
        if query is None or key is None:
            raise HostError(
                "the attention of the vision tower has no q_proj and k_proj that could be read",
                remedy='choose by "tower_similarity"',
            )
        query, key = (_images(each).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (query, key))
        extra = _extra(key.shape[2])
        asks = query[:, :, :1] if extra else query
        logits = (asks @ key.mT).to(torch.float32) * key.shape[-1] ** -0.5
        return logits.softmax(dim=-1).mean(dim=(1, 2))[:, extra:]


class _Similarity:
    """Scores patches by likeness."""

    def on_tower(self, states: Tensor, query: Tensor | None, key: Tensor | None) -> Tensor:
        """(N, patches) from (N, positions, width) states."""
        states = _images(states).to(torch.float32)
        extra = _extra(states.shape[1])
        like = states[:, :1] if extra else states.mean(dim=1, keepdim=True)
        return torch.nn.functional.cosine_similarity(states[:, extra:], like, dim=-1)


def _images(values: Tensor) -> Tensor:
    if values.dim() != 3:
        raise HostError(
            "the vision tower takes the patches of all images in one line, and which are of which is not known",
            remedy="choose by what the decoder is given, such as max_min_diversity",
        )
    return values


def _places(layout: Layout, images: int) -> tuple[np.ndarray, int]:
    """(images, tokens of one) among the B * S of all images of a forward in order, and how often each was repeated."""
    found, counts = [], []
    for sample, items in enumerate(layout.items):
        if (items == UNKNOWN).any():
            raise UsageError(
                f"prompt {sample} has tokens of images, and it cannot be told which are of which",
                remedy="give prompts in one piece, or choose by what the decoder is given",
            )
        numbers = np.unique(items[items >= 0])
        found += [np.flatnonzero(items == number) + sample * len(items) for number in numbers]
        counts.append(len(numbers))
    repeats = max(len(found) // images, 1)  # beams or samples of each prompt side by side
    blocks = np.repeat(counts[::repeats], repeats)[: len(counts)].tolist()
    if len(found) != images * repeats or blocks != counts or len({len(each) for each in found}) > 1:
        raise UsageError(
            f"the vision tower made {images} images, and {len(found)} stand in this forward, of "
            f"{' or '.join(str(size) for size in sorted({len(each) for each in found}))} tokens",
            remedy="give prompts in one piece, with images of one size and no other media",
        )
    order = [
        start + image + copy * count
        for start, count in zip(np.cumsum([0, *counts[::repeats]]) * repeats, counts[::repeats], strict=False)
        for image in range(count)
        for copy in range(repeats)
    ]
    return np.stack([found[each] for each in order]), repeats


def _per_token(scores: Tensor, tokens: int) -> Tensor:
    """(N, tokens) of (N, patches), the means of squares of patches where these are more."""
    patches = scores.shape[1]
    if patches == tokens:
        return scores
    side, to = math.isqrt(patches), math.isqrt(tokens)
    if side**2 != patches or to**2 != tokens or side % to:
        raise UsageError(
            f"{patches} patches of the vision tower make {tokens} tokens of an image, and not square by square",
            remedy="choose by what the decoder is given, such as max_min_diversity",
        )
    return torch.nn.functional.avg_pool2d(scores.view(-1, 1, side, side), side // to).flatten(1)
