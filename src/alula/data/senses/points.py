"""Point clouds as references, read where they are needed to places and colors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from alula.data.errors import BadSampleError, PointsError
from alula.data.media import LoadableArray, MediaRef
from alula.data.senses.axes import check_axes, turned
from alula.data.senses.point_files import Stored, check_columns, columns, read_points

MOST_POINTS = 1_000_000
"""Points of a cloud; of a larger file every k-th is taken."""

GRAY = 0.5
"""Each color of points that have none."""

_FAR = 2.0**13
"""A cloud so many times as far from the origin as it is wide is moved there, or float32 could not tell its points."""


@dataclass(frozen=True, slots=True)
class PointsRef(MediaRef):
    """A point cloud not yet read. Make one with ``from_path``, ``from_bytes`` or ``from_object``.

    Attributes:
        axes: where x, y and z are in the file (alula's: to the right, up, towards the viewer), such as ``"x-zy"`` for
            one whose second axis leads away from the viewer and whose third points up.
        colors: what full brightness is stored as (1, 255 or 65535); None: what the type of the values says.
    """

    noun: ClassVar[str] = "point cloud"
    error: ClassVar[type[BadSampleError]] = PointsError
    decoding: ClassVar[str] = "1"
    options: ClassVar[tuple[str, ...]] = ("axes", "colors")

    axes: str = "xyz"
    colors: float | None = None

    def __post_init__(self) -> None:
        check_axes(self.axes, PointsError)
        if self.colors is not None and (isinstance(self.colors, bool) or self.colors not in (1, 255, 65535)):
            raise PointsError(f"colors: {self.colors!r} is no full brightness", remedy="1, 255 or 65535")

    @classmethod
    def from_object(cls, value: Any) -> PointsRef:
        """An array (N, 3) or (N, 6), a ``PointsRef`` (returned as it is), or anything with ``load()``.

        Raises:
            PointsError: ``value`` is none of these.
        """
        if isinstance(value, PointsRef):
            return value
        if isinstance(value, np.ndarray):
            return cls(f"<array {value.shape}>", maker=value.copy)
        if isinstance(value, LoadableArray):
            return cls._from_loadable(value)
        raise PointsError(
            f"a point cloud cannot be made from {type(value).__name__}", remedy="give an alula.data.PointsRef"
        )

    def load(self) -> np.ndarray:
        """Read the points. Those without a finite place (gaps of a scan) are left out.

        Returns:
            float32 (N, 6): x, y, z in the file's units, red, green, blue in 0..1; `GRAY` where there are no colors. At
            most `MOST_POINTS` of them.

        Raises:
            PointsError: missing, empty, truncated, of a format that is not read, or without its package; no point with
                a place; colors that are not finite, beyond full brightness, or next to nothing of it.
        """
        if self.maker is not None:
            made = np.asarray(self.maker())
            check_columns(made, self.told)
            stored = columns(made[:: -(-len(made) // MOST_POINTS) or 1])
        else:
            stored = read_points(self._stream(), told=self.told, most=MOST_POINTS)
        known = np.isfinite(stored.places).all(axis=1)
        if not known.any():
            raise PointsError(f"{self.told} holds no points" + (" with a place: all are NaN" if len(known) else ""))
        places = turned(stored.places[known], self.axes)
        low, high = places.min(axis=0), places.max(axis=0)
        if np.abs([low, high]).max() > _FAR * (high - low).max() > 0:
            places = places - (low + high) / 2
        return np.concatenate([places, self._colors(stored, known)], axis=1).astype(np.float32)

    def _colors(self, stored: Stored, known: np.ndarray) -> np.ndarray:
        if stored.colors is None:
            if self.colors is not None:
                raise PointsError(f"{self.told} holds no colors", remedy="leave `colors` out")
            return np.full((int(known.sum()), 3), GRAY)
        full = self.colors or stored.full
        colors = np.asarray(stored.colors[known], dtype=np.float64)
        if full is None:
            raise PointsError(
                f"{self.told} holds colors of {stored.colors.dtype}, whose full brightness is open",
                remedy="say it beside the points: colors: 255",
            )
        if not np.isfinite(colors).all():
            raise PointsError(f"{self.told} holds colors that are not finite", remedy="mend them, or save none")
        if colors.min() < 0 or colors.max() > full:
            raise PointsError(
                f"{self.told} holds colors from {colors.min():g} to {colors.max():g}, where {full:g} is full",
                remedy="say what full brightness is stored as: colors: 255",
            )
        if full > 1 and stored.colors.dtype.kind == "f" and 0 < colors.max() <= 1:
            raise PointsError(
                f"{self.told} holds colors up to {colors.max():g}, next to nothing of {full:g}",
                remedy="say what full brightness is stored as: colors: 1",
            )
        return colors / full
