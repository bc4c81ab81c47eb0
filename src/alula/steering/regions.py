"""Regions of images, films and sounds, in their own pixels, frames and seconds.

A region becomes tokens by being painted: a picture that is white in the region and black elsewhere goes through the
processor's own resizing, cropping and tiling, and what share of a token's pixels is white then is the share of the
token that the region covers (`alula.steering.patches`).

Shapes: H, W height and width of an image as it is given to the processor, F frames of a film.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from alula.errors import UsageError
from alula.media import MEDIA
from alula.settings import Number, check_fields
from alula.steering.spans import check_weight

Painted = NDArray[np.float32]
"""(H, W) from 0 to 1"""
_FINE = 4
"""a pixel is inside of a polygon by the share of its own points, so many in a row and in a column"""
_STRIP = 64
"""rows of pixels painted at a time"""


@dataclass(frozen=True, kw_only=True)
class _Region:
    """What regions have in common.

    Attributes:
        weight: in (-1 to 1) times the strength; negative turns away.
        share: of a token that has to lie in the region, from 0 to 1; where no token has as much, those that have most
            of it are taken.
    """

    weight: Number = 1.0
    share: Number = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        check_weight(self, self.weight)
        if not 0 < self.share <= 1:
            raise UsageError(f"a share of {self.share} is not in 0 to 1", where=f"{type(self).__name__}.share")


@dataclass(frozen=True)
class Box(_Region):
    """A rectangle.

    Attributes:
        left, top, right, bottom: in pixels of the image, counted from its upper left corner; right and bottom are
            outside.
        image: index of the image among those of its sample; inside of `Frames` of no account.
    """

    left: Number
    top: Number
    right: Number
    bottom: Number
    image: int = 0

    def paint(self, height: int, width: int) -> Painted:
        """(H, W), 1 inside.

        Raises:
            UsageError: it is no part of the image.
        """
        if not (0 <= self.left < self.right <= width and 0 <= self.top < self.bottom <= height):
            raise UsageError(
                f"{self} is no part of an image of {width} by {height} pixels",
                remedy="give left < right and top < bottom in pixels of the image as the processor is given it",
            )
        rows = _inside(self.top, self.bottom, height)
        return rows[:, None] * _inside(self.left, self.right, width)


def _inside(start: float, stop: float, count: int) -> Painted:
    """(count,) what share of each pixel lies between two places."""
    places = np.arange(count)
    return np.clip(np.minimum(places + 1, stop) - np.maximum(places, start), 0, 1).astype(np.float32)


@dataclass(frozen=True)
class Polygon(_Region):
    """What lies within a line around it.

    Attributes:
        points: its (x, y) corners, in pixels.
        image: index of the image among those of its sample; inside of `Frames` of no account.
    """

    points: tuple[tuple[Number, Number], ...]
    image: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(tuple(point) for point in self.points))
        super().__post_init__()

    def paint(self, height: int, width: int) -> Painted:
        """As `Box.paint`."""
        is_inside = all(0 <= x <= width and 0 <= y <= height for x, y in self.points)
        if len(self.points) < 3 or not is_inside:
            raise UsageError(
                f"{len(self.points)} points make no polygon in an image of {width} by {height} pixels",
                remedy="give three points (x, y) or more, in pixels of the image",
            )
        x, y = self.points[0]
        a, b = next((point for point in self.points if point != (x, y)), (x, y))
        if all((a - x) * (d - y) == (b - y) * (c - x) for c, d in self.points):
            raise UsageError(
                f"the polygon of {self.points} has no area: its points lie on one line",
                remedy="give points (x, y) around a part of the image",
            )
        found = np.zeros((height, width), np.float32)
        top = int(min(y for _, y in self.points))
        bottom = math.ceil(max(y for _, y in self.points))
        # Pillow rounds towards zero, which is not the same above a strip
        whole = [(int(_FINE * x - 0.5), int(_FINE * y - 0.5)) for x, y in self.points]
        for start in range(top, bottom, _STRIP):  # at 16 times the size, a large picture would fill the memory
            stop = min(start + _STRIP, bottom)
            canvas = Image.new("L", (_FINE * width, _FINE * (stop - start)))
            ImageDraw.Draw(canvas).polygon([(x, y - _FINE * start) for x, y in whole], fill=1)
            points = np.asarray(canvas).reshape(stop - start, _FINE, width, _FINE).sum(axis=(1, 3), dtype=np.uint8)
            found[start:stop] = points / np.float32(_FINE**2)
        if not found.any():
            raise UsageError(
                f"the polygon of {self.points} holds nothing of the image",
                remedy="give points (x, y) in pixels of the image, around a part of it",
            )
        return found


@dataclass(frozen=True, eq=False)
class Mask(_Region):
    """What a picture of the region says.

    Attributes:
        values: (H, W) of the image's own size: true or false, or from 0 to 1; a picture in shades of gray (black: 0).
        image: index of the image among those of its sample; inside of `Frames` of no account.
    """

    values: Any
    image: int = 0

    def paint(self, height: int, width: int) -> Painted:
        """As `Box.paint`."""
        is_picture = isinstance(self.values, Image.Image)
        values: Painted = np.asarray(self.values.convert("L") if is_picture else self.values, dtype=np.float32)
        values = values / np.float32(255 if is_picture else 1)
        if values.shape != (height, width):
            raise UsageError(
                f"a mask of {values.shape} does not fit an image of {height} rows and {width} columns of pixels",
                remedy="give it in the size of the image as the processor is given it",
            )
        if not values.any() or values.min() < 0 or values.max() > 1:
            raise UsageError(
                "a mask holds numbers from 0 to 1, some of them above 0", remedy="scale it, such as mask / mask.max()"
            )
        return values


Area = Box | Polygon | Mask


@dataclass(frozen=True)
class Frames(_Region):
    """Some frames of a film, or a part of them.

    Attributes:
        start, stop: the first frame, and the one behind the last, of the film as the processor is given it.
        film: index of the film among those of its sample.
        inside: a region of these frames; None: all of them.
    """

    start: int
    stop: int
    film: int = 0
    inside: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inside is not None and not isinstance(self.inside, Area):
            raise UsageError(
                f"a {type(self.inside).__name__} is no region of a frame",
                where="Frames.inside",
                remedy="give a Box, Polygon or Mask",
            )

    def paint(self, frames: int, height: int, width: int) -> Painted:
        """(F, H, W), 1 inside.

        Raises:
            UsageError: it is no part of the film.
        """
        if not 0 <= self.start < self.stop <= frames:
            raise UsageError(
                f"frames {self.start} to {self.stop} are not in a film of {frames}",
                remedy="count frames of the film as it is given, from 0",
            )
        one = np.ones((height, width), np.float32) if self.inside is None else self.inside.paint(height, width)
        found = np.zeros((frames, height, width), np.float32)
        found[self.start : self.stop] = one
        return found


@dataclass(frozen=True)
class Seconds(_Region):
    """A stretch of a sound.

    Attributes:
        start, stop: in seconds.
        sound: index of the sound among those of its sample.
    """

    start: Number
    stop: Number
    sound: int = 0

    def shares(self, edges: Sequence[tuple[float, float]]) -> Painted:
        """What share of each token lies in the stretch, given from where to where each hears.

        Raises:
            UsageError: it is no part of the sound.
        """
        end = max((stop for _, stop in edges), default=0.0)
        if not 0 <= self.start < self.stop or self.start >= end:
            raise UsageError(
                f"seconds {self.start} to {self.stop} are not in a sound of {end:.2f}",
                remedy="give seconds from the sound's start",
            )
        begun, ended = np.asarray(edges, dtype=np.float64).T
        inside = np.clip(np.minimum(ended, self.stop) - np.maximum(begun, self.start), 0, None)
        return (inside / (ended - begun)).astype(np.float32)


@dataclass(frozen=True)
class Whole(_Region):
    """All tokens of a medium, whatever it is made of.

    Attributes:
        medium: "image", "video", "audio".
        index: which of its sample's; None: every one.
    """

    medium: str = "image"
    index: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.medium not in MEDIA:
            raise UsageError(
                f"there is no medium {self.medium!r}", where="Whole.medium", remedy=f"one of {list(MEDIA)}"
            )


Region = Box | Polygon | Mask | Frames | Seconds | Whole
