"""Depth maps as references, read where they are needed to meters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from alula.bounds import DEFAULT_MAX_PIXELS
from alula.data.errors import BadSampleError, DepthError
from alula.data.media import LoadableArray, MediaRef
from alula.data.senses.rasters import check_size, read_raster
from alula.errors import quoted

UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
MOST_METERS = 1000.0
"""Farthest depth that is taken for one."""

_REMEDY = "say it beside the map: unit: mm, or scale: METERS (of one stored step; 0.0002 where 5,000 are a meter)"


@dataclass(frozen=True, slots=True)
class DepthRef(MediaRef):
    """A depth map not yet read. Make one with ``from_path``, ``from_bytes`` or ``from_object``.

    Attributes:
        unit: of the stored values, a key of `UNITS`; None: meters where they are floating-point numbers.
        scale: meters of a stored step, in the place of a unit.
        unknown: a stored value that says that nothing is known; zeros and values that are not finite always do.
        channel: of an EXR with several channels, the one that holds depth.
        max_pixels: width x height above which ``load`` refuses.
    """

    noun: ClassVar[str] = "depth map"
    error: ClassVar[type[BadSampleError]] = DepthError
    decoding: ClassVar[str] = "1"
    options: ClassVar[tuple[str, ...]] = ("unit", "scale", "unknown", "channel")

    unit: str | None = None
    scale: float | None = None
    unknown: float | None = None
    channel: str | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self) -> None:
        if self.unit is not None and self.unit not in UNITS:
            raise DepthError(f"unit: {quoted(self.unit, 40)} is no unit of depth", remedy=f"one of {', '.join(UNITS)}")
        if self.scale is not None and (not _number(self.scale) or not 0 < self.scale < math.inf):
            raise DepthError(f"scale: {quoted(self.scale, 40)} is no number of meters above 0")
        if self.scale is not None and self.unit is not None:
            raise DepthError("both unit and scale are given", remedy="keep one: scale is in meters")
        if self.unknown is not None and not _number(self.unknown):
            raise DepthError(f"unknown: {quoted(self.unknown, 40)} is no number")
        if self.channel is not None and not isinstance(self.channel, str):
            raise DepthError(f"channel: {quoted(self.channel, 40)} is no name")

    @classmethod
    def from_object(cls, value: Any) -> DepthRef:
        """Meters as an array (H, W), a ``DepthRef`` (returned as it is), or anything with ``load()``.

        Raises:
            DepthError: ``value`` is none of these.
        """
        if isinstance(value, DepthRef):
            return value
        if isinstance(value, np.ndarray):
            return cls(f"<array {value.shape}>", maker=value.copy)
        if isinstance(value, LoadableArray):
            return cls._from_loadable(value)
        raise DepthError(
            f"a depth map cannot be made from {type(value).__name__}", remedy="give an alula.data.DepthRef"
        )

    def load(self) -> np.ndarray:
        """Read the map.

        Returns:
            float32 (H, W), meters; 0 where the depth is unknown (stored as 0, as ``unknown``, or as no finite number).

        Raises:
            DepthError: missing, empty, truncated, too large, of a format that is not read, or without its package; no
                map of one channel, or compressed with loss; integers without a unit; nothing known, something nearer
                than 0 or farther than `MOST_METERS`.
        """
        if self.maker is not None:
            stored = np.asarray(self.maker())
            check_size(stored.shape, self.told, DepthError, self.max_pixels, 1)
        else:
            raster = read_raster(
                self._stream(),
                told=self.told,
                error=DepthError,
                max_pixels=self.max_pixels,
                channels=1,
                channel=self.channel,
            )
            stored = raster.values
            if stored.ndim != 2 or raster.is_lossy:
                what = "a colored picture" if stored.ndim != 2 else "compressed with loss"
                raise DepthError(f"{self.told} is {what}, not depth", remedy="save 16-bit gray PNG, EXR or NPY")
        return self._meters(stored)

    def _meters(self, stored: np.ndarray) -> np.ndarray:
        if self.unit is None and self.scale is None and stored.dtype.kind != "f":
            raise DepthError(f"{self.told} holds integers ({stored.dtype}) without a unit", remedy=_REMEDY)
        step = self.scale or UNITS[self.unit or "m"]
        known = np.isfinite(stored) & (stored != 0)
        if self.unknown is not None:
            # stored numbers may be rounded to fewer digits than those of JSON
            known &= stored != np.asarray(self.unknown, dtype=stored.dtype if stored.dtype.kind == "f" else np.float64)
        if not known.any():
            raise DepthError(f"{self.told} knows no depth anywhere: all is 0, NaN or infinite")
        meters = np.where(known, stored, 0).astype(np.float64) * step
        low, high = meters[known].min(), meters.max()
        if low < 0:
            raise DepthError(
                f"{self.told} holds {low:g} meters, nearer than 0",
                remedy="if a stored value says that nothing is known, name it: unknown: -1",
            )
        if high > MOST_METERS:
            raise DepthError(
                f"{self.told} holds {high:,.0f} meters, more than {MOST_METERS:,.0f}",
                remedy=f"{_REMEDY}; or name the value that says that nothing is known: unknown: VALUE",
            )
        return meters.astype(np.float32)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
