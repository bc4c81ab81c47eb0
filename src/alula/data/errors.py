"""What can be wrong with a record: one class per cause, each knowing the file and line it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from alula.errors import DataError, quoted

_LONGEST = 120  # characters of an id that are shown


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record lives: a file and its 1-based line (or a dataset and its 0-based row), and the record's id."""

    file: str
    line: int | None = None
    record: str | None = None
    unit: str = "line"

    def __str__(self) -> str:
        if self.line is None:
            return self.file
        return f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file} [{self.unit} {self.line}]"

    @property
    def named(self) -> str | None:
        """The record's id as it is shown: itself, or its ends where it is long."""
        return quoted(self.record) if self.record and len(self.record) > _LONGEST else self.record


class BadSampleError(DataError):
    """A sample that cannot be used. ``kind`` names the cause in reports and quarantine files.

    Args:
        message: what is wrong with it.
        where: text form of the place; by default ``place`` as it is written.
        remedy: what the user can do about it.
        place: the record's location.
    """

    kind = "bad sample"

    def __init__(
        self, message: str, *, where: str | None = None, remedy: str | None = None, place: Place | None = None
    ) -> None:
        self.place = place
        super().__init__(_without_traceback(message), where=where or (str(place) if place else None), remedy=remedy)

    def at(self, place: Place) -> Self:
        """The error, told where it happened; one that knows its place already is returned as it is."""
        return self if self.place else type(self)(self.message, remedy=self.remedy, place=place)

    @property
    def where_named(self) -> str | None:
        """Where it happened, the record's id beside it: a JSON array may hold all its records in one line."""
        named = self.place and self.place.named
        return f"{self.where} (record {named})" if named else self.where

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.where, self.remedy, self.place)


class RecordError(BadSampleError):
    """A record whose structure is off: not JSON, a missing key, an unknown role, turns out of order."""

    kind = "record"


class PlaceholderError(BadSampleError):
    """The number of placeholders differs from the number of images (videos, audio clips).

    Attributes:
        counts: placeholders and images (videos, audio clips) of the record, where they were counted.
        medium: a name of `alula.media`.
    """

    kind = "placeholders"
    counts = (0, 0)
    medium = "image"


class ImageError(BadSampleError):
    """An image that is missing, corrupt, too large, or has no defined brightness."""

    kind = "image"


class VideoError(BadSampleError):
    """A video that is missing, corrupt, truncated, or too large."""

    kind = "video"


class AudioError(BadSampleError):
    """An audio clip that is missing, corrupt, truncated, or too long."""

    kind = "audio"


class PointsError(BadSampleError):
    """A point cloud that is missing, corrupt, or without places."""

    kind = "points"


class DepthError(BadSampleError):
    """A depth map that is missing, corrupt, without a unit, or too far."""

    kind = "depth"


class NormalsError(BadSampleError):
    """A map of surface normals that is missing, corrupt, or of no unit vectors."""

    kind = "normals"


class MotionError(BadSampleError):
    """A motion recording that is missing, corrupt, or without rate or units."""

    kind = "motion"


class ResponseError(BadSampleError):
    """A brain response that is missing, corrupt, with voxels that are not finite, or too large."""

    kind = "response"


class TooLongError(BadSampleError):
    """A sample with more tokens than allowed; placeholders are never cut to make it fit."""

    kind = "too long"


class EmptyBatchError(DataError):
    """A batch with no usable sample, nor any to take its place."""


class UnsupervisedError(BadSampleError):
    """A training sample without a single token to learn from."""

    kind = "unsupervised"


def _rebuild(
    cls: type[BadSampleError], message: str, where: str | None, remedy: str | None, place: Place | None
) -> BadSampleError:
    return cls(message, where=where, remedy=remedy, place=place)


def _without_traceback(message: str) -> str:
    """Reduce the text a torch DataLoader worker sends up to the error itself.

    torch re-raises a worker's exception as ``type(error)("Caught ... Original Traceback ... module.Class: text")``;
    a reader wants only the text.
    """
    if not message.startswith("Caught ") or "Traceback (most recent call last)" not in message:
        return message
    return re.split(rf"^{re.escape(__name__)}\.\w+: ", message, flags=re.MULTILINE)[-1].strip()
