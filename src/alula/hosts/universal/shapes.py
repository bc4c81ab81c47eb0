"""The sizes of a universal host: of its projection module, and of what turns each medium into tokens.

All are plain values that configurations and processors keep as dictionaries. The defaults are those of OneLLM
(arXiv 2312.03700) as published code has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from alula.errors import UsageError

ROUTERS = ("soft_sigmoid", "softmax", "constant", "sparse")
"""How experts are weighed, see `alula.hosts.universal.projection.Router`"""

CHANNELS = 6
"""values of a point (x, y, z, red, green, blue) and of a sample of motion (acceleration, angular rate)"""

_ROUND = 256


@dataclass(frozen=True)
class ProjectionShape:
    """How the projection module is made.

    Args:
        experts: how many there are.
        depth: blocks of an expert.
        heads: of a block's attention.
        modality_tokens: learned tokens per medium that the decoder is given in the place of an item, between its tags.
        feedforward: width inside a block; 0: 8/3 of the encoder's width, rounded up to a multiple of 256.
        router: one of `ROUTERS`.
    """

    experts: int = 3
    depth: int = 8
    heads: int = 16
    modality_tokens: int = 30
    feedforward: int = 0
    router: str = "soft_sigmoid"

    def __post_init__(self) -> None:
        _at_least(self, "connector_options", experts=1, depth=1, heads=1, modality_tokens=1, feedforward=0)
        if self.router not in ROUTERS:
            raise UsageError(
                f"no router is called {self.router!r}", where="router", remedy=f"one of: {', '.join(ROUTERS)}"
            )

    @property
    def tokens(self) -> int:
        """Decoder tokens of one item: a start tag, the modality tokens, an end tag."""
        return self.modality_tokens + 2

    def feedforward_of(self, width: int) -> int:
        """The width inside a block of an encoder so wide."""
        return self.feedforward or -(-(8 * width // 3) // _ROUND) * _ROUND


@dataclass(frozen=True)
class Picture:
    """Images, which pass the encoder's own way in."""

    least: ClassVar[Mapping[str, int]] = {}


@dataclass(frozen=True)
class Frames:
    """Videos: frames that pass the encoder as images do; what it makes of them is averaged token by token.

    Args:
        frames: of a video, taken evenly over its time.
    """

    frames: int = 8
    least: ClassVar[Mapping[str, int]] = {"frames": 1}


@dataclass(frozen=True)
class DepthFrames:
    """Depth maps as pictures.

    Args:
        with_image: 1: the item's RGB picture is a second frame, where it has one, as in the published code.
        most: meters that are white; what is farther is white, too.
    """

    with_image: int = 0
    most: float = 10.0
    least: ClassVar[Mapping[str, int]] = {"with_image": 0}

    def __post_init__(self) -> None:
        if not self.most > 0:
            raise UsageError(f"most must be above 0 meters, not {self.most}", where="modality_options.depth")

    @property
    def frames(self) -> int:
        """Pictures of one item."""
        return 1 + bool(self.with_image)


@dataclass(frozen=True)
class NormalFrames:
    """Maps of surface normals as pictures.

    Args:
        with_image: as of `DepthFrames`.
    """

    with_image: int = 0
    least: ClassVar[Mapping[str, int]] = {"with_image": 0}

    @property
    def frames(self) -> int:
        """Pictures of one item."""
        return 1 + bool(self.with_image)


@dataclass(frozen=True)
class Spectrogram:
    """Sounds: a two-dimensional convolution over (bins, moments).

    Args:
        bins, moments: of a spectrogram; the feature extractor's where one is named.
        kernel, stride: of the convolution, both ways.
    """

    bins: int = 128
    moments: int = 1024
    kernel: int = 16
    stride: int = 10
    least: ClassVar[Mapping[str, int]] = {"bins": 1, "moments": 1, "kernel": 1, "stride": 1}

    @property
    def size(self) -> tuple[int, ...]:
        return self.moments, self.bins

    @property
    def tokens(self) -> int:
        return _steps(self.bins, self.kernel, self.stride) * _steps(self.moments, self.kernel, self.stride)


@dataclass(frozen=True)
class Cloud:
    """Point clouds: centers by farthest point sampling, their neighbors, a linear map and the largest of a group.

    Args:
        points: of a cloud; of one with more so many are drawn, in one with fewer some come again.
        groups: centers, each a token.
        neighbors: points of a group.
    """

    points: int = 8192
    groups: int = 1024
    neighbors: int = 32
    least: ClassVar[Mapping[str, int]] = {"points": 1, "groups": 1, "neighbors": 1}

    def __post_init__(self) -> None:
        if max(self.groups, self.neighbors) > self.points:
            raise UsageError(
                f"{self.groups} groups of {self.neighbors} cannot be chosen among {self.points} points",
                where="modality_options.points",
            )

    @property
    def size(self) -> tuple[int, ...]:
        return self.points, CHANNELS

    @property
    def tokens(self) -> int:
        return self.groups


@dataclass(frozen=True)
class Series:
    """Motion: a convolution over time.

    Args:
        samples: of a recording.
        rate: samples per second.
        kernel, stride: of the convolution.
    """

    samples: int = 400
    rate: int = 200
    kernel: int = 10
    stride: int = 1
    least: ClassVar[Mapping[str, int]] = {"samples": 1, "rate": 1, "kernel": 1, "stride": 1}

    @property
    def size(self) -> tuple[int, ...]:
        return self.samples, CHANNELS

    @property
    def tokens(self) -> int:
        return _steps(self.samples, self.kernel, self.stride)


@dataclass(frozen=True)
class Vector:
    """Brain responses: a linear map of the whole.

    Args:
        voxels: of a response.
        parts: tokens that it becomes.
    """

    voxels: int = 15724
    parts: int = 8
    least: ClassVar[Mapping[str, int]] = {"voxels": 1, "parts": 1}

    @property
    def size(self) -> tuple[int, ...]:
        return (self.voxels,)

    @property
    def tokens(self) -> int:
        return self.parts


Shape = Picture | Frames | DepthFrames | NormalFrames | Spectrogram | Cloud | Series | Vector

SHAPES: Mapping[str, type[Shape]] = {
    "image": Picture,
    "video": Frames,
    "audio": Spectrogram,
    "points": Cloud,
    "depth": DepthFrames,
    "normals": NormalFrames,
    "motion": Series,
    "response": Vector,
}
"""Name of a medium -> the class of its sizes; the media that a universal encoder reads"""

PICTURES = ("image", "video", "depth", "normals")
"""Media that pass the encoder's own way in."""


def shape_of(medium: str, options: Mapping[str, Any] | None = None) -> Shape:
    """The sizes of a medium that a user asked for.

    Raises:
        UsageError: an unknown option or an impossible value.
    """
    kind, where = SHAPES[medium], f"modality_options.{medium}"
    known = [field.name for field in fields(kind)]
    for name in options or {}:
        if name not in known:
            raise UsageError(
                f"{medium} has no option {name!r}", where=where, remedy=f"legal: {', '.join(known) or 'none'}"
            )
    given = dict(options or {})
    for name in kind.least.keys() & given.keys():
        given[name] = _whole(given[name], name, where)
    made = kind(**given)
    _at_least(made, where, **kind.least)
    if getattr(made, "tokens", 1) < 1:
        raise UsageError("the kernel is longer than what it goes over", where=where)
    return made


def plain(shape: Shape | ProjectionShape) -> dict[str, Any]:
    """Plain values for a configuration."""
    return asdict(shape)


def _steps(length: int, kernel: int, stride: int) -> int:
    """Places of a kernel along a length; 0 or fewer where it does not fit."""
    return (length - kernel) // stride + 1 if length >= kernel else 0


def _at_least(made: Any, where: str, **least: int) -> None:
    for name, bound in least.items():
        value = getattr(made, name)
        if not isinstance(value, int) or value < bound:
            raise UsageError(f"{name} must be a whole number of at least {bound}, not {value!r}", where=where)


def _whole(value: Any, name: str, where: str) -> int:
    """A whole number, given as such or as a float (recipes know no difference)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise UsageError(f"{name} must be a whole number, not {value!r}", where=where)
    return int(value)
