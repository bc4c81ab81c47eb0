"""Captions and images in one space (stage 1): a caption by the state of its last token, an image by its features.

Shapes: B batch, d width of the stream, N images, P positions of an image in the tower, f width of its features, r width
of the space.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_START, _MOST = math.log(1 / 0.07), math.log(100)


class CaptionPairs(NamedTuple):
    """What a forward says of its captions and images.

    Attributes:
        captions: (B, r) float32 of unit length, one for every sample, whether it is a caption or not.
        images: (B, r) float32 of unit length, of the image each caption is of; 0 in a forward without images.
        item: (B,) int64 which of the forward's images it is of; -1: the sample is no caption.
        scale: () float32, what cosines are multiplied by: 1 / temperature.
    """

    captions: Tensor
    images: Tensor
    item: Tensor
    scale: Tensor


class RetrievalHead(nn.Module):
    """Two linear maps into the space, and a learned temperature.

    A norm in front would change no cosine but by its gains, which the map of captions holds as well.

    Args:
        hidden_size: d.
        feature_size: f.
        width: r.
        like: a tensor whose dtype and device its weights take.
    """

    def __init__(self, hidden_size: int, feature_size: int, width: int, like: Tensor) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.caption = nn.Parameter(torch.empty(width, hidden_size, **place))
        self.image = nn.Parameter(torch.empty(width, feature_size, **place))
        self.log_scale = nn.Parameter(torch.full((1,), _START, **place))  # of one dimension, so that it can be sharded
        nn.init.normal_(self.caption, std=hidden_size**-0.5)
        nn.init.normal_(self.image, std=feature_size**-0.5)

    def forward(self, states: Tensor, features: Tensor | None, item: Tensor) -> CaptionPairs:
        """The pairs of a forward.

        Args:
            states: (B, d) of each sample's last token.
            features: (N, P, f) of the tower, or None.
            item: (B,) int64, see `CaptionPairs`.
        """
        # clones: a layer's own weights may be sharded again before backward comes here, ahead of the layer's output
        caption, scale = self.caption.clone(), _scale(self.log_scale.clone().float())
        captions = _unit(F.linear(states.to(caption.dtype), caption))
        if features is None:  # the map of images takes part all the same, as on processes that have some
            return CaptionPairs(captions, torch.zeros_like(captions) + 0.0 * self.image.sum().float(), item, scale)
        return CaptionPairs(captions, self.images(features).index_select(0, item.clamp(min=0)), item, scale)

    def images(self, features: Tensor) -> Tensor:
        """(N, r) float32 of unit length, from the mean over positions of (N, P, f) features."""
        image = self.image.clone()
        return _unit(F.linear(features.mean(dim=1).to(image.dtype), image))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


def _scale(log_scale: Tensor) -> Tensor:
    """() exp of the (1,) logarithm, at most 100 (CLIP). Beyond it no gradient leads further, and one that leads back
    passes, so that a learned temperature does not get stuck there."""
    clamped = log_scale.clamp(max=_MOST)
    if not log_scale.requires_grad:
        return clamped.exp()[0]
    is_beyond = log_scale.detach() > _MOST
    passed = log_scale + (clamped - log_scale).detach()
    passed.register_hook(lambda slope: torch.where(is_beyond & (slope < 0), 0, slope))
    return passed.exp()[0]
