"""Maps of surface normals as references, read where they are needed to unit vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from alula.bounds import DEFAULT_MAX_PIXELS
from alula.data.errors import BadSampleError, NormalsError
from alula.data.media import LoadableArray, MediaRef
from alula.data.senses.axes import check_axes, turned
from alula.data.senses.rasters import check_size, read_raster

_NEAR = 0.1
"""How far from 1 the length of a vector may be that was rounded to 8 bits, or averaged when a map was scaled"""
_OTHERS = 0.05
"""Share of vectors that may be of other lengths: edges, where two surfaces were averaged"""


@dataclass(frozen=True, slots=True)
class NormalsRef(MediaRef):
    """A map of surface normals not yet read. Make one with ``from_path``, ``from_bytes`` or ``from_object``.

    alula's axes: x to the right, y upwards, z towards the viewer. In pictures -1..1 is stored as 0..full.

    Attributes:
        axes: where these are in the file, such as ``"x-yz"`` for one whose y points downwards.
        max_pixels: width x height above which ``load`` refuses.
    """

    noun: ClassVar[str] = "normal map"
    error: ClassVar[type[BadSampleError]] = NormalsError
    decoding: ClassVar[str] = "1"
    options: ClassVar[tuple[str, ...]] = ("axes",)

    axes: str = "xyz"
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self) -> None:
        check_axes(self.axes, NormalsError)

    @classmethod
    def from_object(cls, value: Any) -> NormalsRef:
        """Vectors as an array (H, W, 3), a ``NormalsRef`` (returned as it is), or anything with ``load()``.

        Raises:
            NormalsError: ``value`` is none of these.
        """
        if isinstance(value, NormalsRef):
            return value
        if isinstance(value, np.ndarray):
            return cls(f"<array {value.shape}>", maker=value.copy)
        if isinstance(value, LoadableArray):
            return cls._from_loadable(value)
        raise NormalsError(
            f"a normal map cannot be made from {type(value).__name__}", remedy="give an alula.data.NormalsRef"
        )

    def load(self) -> np.ndarray:
        """Read the map.

        Returns:
            float32 (H, W, 3), vectors of length 1; 0 where nothing is known: stored as zeros, as black or middle gray
            in a picture, as transparent, or as no finite numbers.

        Raises:
            NormalsError: missing, empty, truncated, too large, of a format that is not read, or without its package;
                no map of three channels; nothing known, or vectors that are not of length 1.
        """
        if self.maker is not None:
            stored = np.asarray(self.maker())
            check_size(stored.shape, self.told, NormalsError, self.max_pixels, 3)
        else:
            stored = read_raster(
                self._stream(), told=self.told, error=NormalsError, max_pixels=self.max_pixels, channels=3
            ).values
        if stored.ndim != 3:
            raise NormalsError(
                f"{self.told} has one value a pixel, not three",
                remedy="normals are vectors: save (height, width, 3), or read it as depth",
            )
        known = np.isfinite(stored).all(axis=-1)
        if stored.shape[-1] == 4:
            known &= stored[..., 3] > 0
            stored = stored[..., :3]
        vectors = np.where(known[..., None], stored, 0).astype(np.float64)
        if stored.dtype.kind != "f":
            if stored.dtype.kind != "u":
                raise NormalsError(f"{self.told} holds {stored.dtype}", remedy="save floats, or 8 or 16 bits")
            known &= stored.any(axis=-1)
            vectors = vectors / np.iinfo(stored.dtype).max * 2 - 1
        lengths = np.linalg.norm(vectors, axis=-1)
        known &= lengths > _NEAR
        if not known.any():
            raise NormalsError(f"{self.told} knows no normal anywhere: all is 0 or NaN")
        others = (np.abs(lengths[known] - 1) > _NEAR).mean()
        if others > _OTHERS:
            inside = stored.dtype.kind == "f" and stored[known].min() >= 0 and stored[known].max() <= 1
            raise NormalsError(
                f"{self.told} holds vectors that are not of length 1 ({others:.0%} of those known)",
                remedy="0..1 stands for -1..1 in pictures alone: save array * 2 - 1"
                if inside
                else "save unit vectors, or 8-bit RGB in which 0..255 stands for -1..1",
            )
        unit = np.where(known[..., None], vectors / np.maximum(lengths, _NEAR)[..., None], 0)
        return turned(unit.astype(np.float32), self.axes)
