"""From raw values of a medium to the tokens that a vision transformer reads instead of patches.

Shapes: N items, L tokens of an item, w the encoder's width. Each tokenizer has a table of learned positions, one row
for every token, and one in front for the encoder's class token where it has one.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from alula.hosts.universal.points import grouped
from alula.hosts.universal.shapes import CHANNELS, Cloud, Series, Shape, Spectrogram, Vector


class Tokenizer(nn.Module, abc.ABC):
    """A medium's way in.

    Args:
        tokens: L. width: w. first: whether a class token stands in front.
    """

    def __init__(self, tokens: int, width: int, *, first: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(tokens + first, width))

    @abc.abstractmethod
    def tokens(self, values: Tensor) -> Tensor:
        """Raw values, as precise as they were given -> (N, L, w) in the weights' precision, without positions."""

    def forward(self, values: Tensor, first: Tensor | None) -> Tensor:
        """Raw values of N items -> (N, L, w), or (N, 1 + L, w) behind the encoder's class token (w,)."""
        tokens = self.tokens(values)
        if first is not None:
            tokens = torch.cat([first.to(tokens).expand(len(tokens), 1, -1), tokens], dim=1)
        return tokens + self.positions


class SpectrogramTokenizer(Tokenizer):
    """Spectrograms (N, moments, bins) through a convolution over (bins, moments); tokens row by row of bins."""

    def __init__(self, shape: Spectrogram, width: int, *, first: bool) -> None:
        super().__init__(shape.tokens, width, first=first)
        self.project = nn.Conv2d(1, width, shape.kernel, shape.stride)

    def tokens(self, values: Tensor) -> Tensor:
        return self.project(values.to(self.positions.dtype).transpose(1, 2)[:, None]).flatten(2).transpose(1, 2)


class SeriesTokenizer(Tokenizer):
    """Motion (N, samples, 6) through a convolution over time."""

    def __init__(self, shape: Series, width: int, *, first: bool) -> None:
        super().__init__(shape.tokens, width, first=first)
        self.project = nn.Conv1d(CHANNELS, width, shape.kernel, shape.stride, bias=False)

    def tokens(self, values: Tensor) -> Tensor:
        return self.project(values.to(self.positions.dtype).transpose(1, 2)).transpose(1, 2)


class VectorTokenizer(Tokenizer):
    """Responses (N, voxels) through a linear map to w * L values; token t is made of values t, t + L, t + 2L, ..."""

    def __init__(self, shape: Vector, width: int, *, first: bool) -> None:
        super().__init__(shape.tokens, width, first=first)
        self.project = nn.Linear(shape.voxels, width * shape.parts)
        self.parts = shape.parts

    def tokens(self, values: Tensor) -> Tensor:
        return self.project(values.to(self.positions.dtype)).unflatten(1, (-1, self.parts)).transpose(1, 2)


class CloudTokenizer(Tokenizer):
    """Points (N, P, 6): groups by geometry, a linear map of each point, and the largest of every group."""

    def __init__(self, shape: Cloud, width: int, *, first: bool) -> None:
        super().__init__(shape.tokens, width, first=first)
        self.project = nn.Linear(CHANNELS, width)
        self.groups, self.neighbors = shape.groups, shape.neighbors

    def tokens(self, values: Tensor) -> Tensor:
        found = grouped(values, self.groups, self.neighbors)  # before anything is rounded to half precision
        return self.project(found.to(self.positions.dtype)).amax(dim=2)


def tokenizer_of(shape: Shape, width: int, *, first: bool) -> Tokenizer | None:
    """The tokenizer of a medium with these sizes; None for pictures, which the encoder takes as they are."""
    match shape:
        case Spectrogram():
            return SpectrogramTokenizer(shape, width, first=first)
        case Series():
            return SeriesTokenizer(shape, width, first=first)
        case Vector():
            return VectorTokenizer(shape, width, first=first)
        case Cloud():
            return CloudTokenizer(shape, width, first=first)
    return None
