"""Brain responses as references: one value per voxel, read where they are needed."""

from __future__ import annotations

import gzip
import io
import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any, BinaryIO, ClassVar

import numpy as np

from alula.data.errors import BadSampleError, ResponseError
from alula.data.media import LoadableArray, MediaRef
from alula.data.senses.arrays import is_npy, open_npy
from alula.data.senses.point_files import INSTALL
from alula.errors import quoted

MOST_VOXELS = 1_000_000
"""Longest response; a mask makes one of a larger volume."""
MOST_VALUES = 200_000_000
"""Largest volume, or series of them, that is opened; NIfTI states its size before its values."""

_NIFTI_1, _NIFTI_2 = 348, 540
"""Sizes of their headers, with which their files begin"""


@dataclass(frozen=True, slots=True)
class ResponseRef(MediaRef):
    """A response not yet read. Make one with ``from_path``, ``from_bytes`` or ``from_object``.

    Attributes:
        mask: a file (NPY or NIfTI) of the response's shape; voxels that are not 0 there are kept, in C order. Several
            paths: the first that is there.
        repeats: ``"mean"``: the first axis of an array, or the fourth of a NIfTI series, is of repeats, over which the
            mean is taken.
    """

    noun: ClassVar[str] = "brain response"
    error: ClassVar[type[BadSampleError]] = ResponseError
    decoding: ClassVar[str] = "1"
    options: ClassVar[tuple[str, ...]] = ("mask", "repeats")
    files: ClassVar[tuple[str, ...]] = ("mask",)

    mask: str | tuple[str, ...] | None = None
    repeats: str | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and not (isinstance(self.mask, str | tuple) and self.mask):
            raise ResponseError(f"mask: {quoted(self.mask, 40)} is no path")
        if self.repeats not in (None, "mean"):
            raise ResponseError(f"repeats: {quoted(self.repeats, 40)}", remedy="repeats: mean, or nothing")

    @classmethod
    def from_object(cls, value: Any) -> ResponseRef:
        """An array (voxels,), a ``ResponseRef`` (returned as it is), or anything with ``load()``.

        Raises:
            ResponseError: ``value`` is none of these.
        """
        if isinstance(value, ResponseRef):
            return value
        if isinstance(value, np.ndarray):
            return cls(f"<array {value.shape}>", maker=value.copy)
        if isinstance(value, LoadableArray):
            return cls._from_loadable(value)
        raise ResponseError(
            f"a brain response cannot be made from {type(value).__name__}", remedy="give an alula.data.ResponseRef"
        )

    def load(self) -> np.ndarray:
        """Read the response.

        Returns:
            float32 (voxels,): those of the mask; all, in C order, without one.

        Raises:
            ResponseError: missing, empty, truncated, of a format that is not read, or without its package; repeats that
                nobody said what to do with; a mask of another shape or place; voxels that are not finite, or too many.
        """
        affine = None
        if self.maker is not None:
            values = np.asarray(self.maker())
        else:
            values, affine, is_series = _volume(self._stream(), self.told)
            if is_series and self.repeats is None:
                raise ResponseError(f"{self.told} is a series of {values.shape[-1]} volumes", remedy=_REPEATS)
            if is_series:
                values = np.moveaxis(values, -1, 0)
        if self.repeats == "mean" and (affine is None or is_series):  # of one volume it is the mean
            if values.ndim < 2:
                raise ResponseError(f"{self.told} has the shape {values.shape}, without repeats", remedy="leave it out")
            values = np.asarray(values, dtype=np.float64).mean(axis=0)
        if self.mask is not None:
            values = values[self._kept(values.shape, affine)]
        elif values.ndim == 2:
            raise ResponseError(f"{self.told} has the shape {values.shape}, not (voxels,)", remedy=_REPEATS)
        values = np.asarray(values).reshape(-1)
        if not 0 < values.size <= MOST_VOXELS:
            raise ResponseError(
                f"{self.told} holds {values.size:,} voxels, where 1 to {MOST_VOXELS:,} are taken",
                remedy="keep those of a region: mask: MASK.nii.gz",
            )
        values = values.astype(np.float32)
        lost = ~np.isfinite(values)
        if lost.any():
            raise ResponseError(
                f"{self.told} holds {int(lost.sum()):,} of {len(values):,} voxels that are not finite",
                remedy="leave them out by a mask; a model gives every voxel a weight, so none can be left open",
            )
        return values

    def _kept(self, shape: tuple[int, ...], affine: np.ndarray | None) -> np.ndarray:
        paths = (self.mask,) if isinstance(self.mask, str) else self.mask or ()
        path = next(filter(os.path.isfile, paths), None)
        told = f"mask {quoted(os.path.basename(paths[0]), 120)} of {self.told}"
        if path is None:
            raise ResponseError(f"{told} is missing: no file {' nor '.join(paths)}")
        mask, placed, _ = _volume(path, told)
        if mask.shape != shape:
            raise ResponseError(f"{told} has the shape {mask.shape}, the response {shape}", remedy="take its own mask")
        if affine is not None and placed is not None and not np.allclose(affine, placed, atol=1e-3):
            raise ResponseError(
                f"{told} lies elsewhere: their affine matrices differ", remedy="resample the mask to the response"
            )
        kept = np.isfinite(mask) & (np.asarray(mask) != 0)
        if not kept.any():
            raise ResponseError(f"{told} keeps no voxel")
        return kept


_REPEATS = "take their mean, repeats: mean, or save one of them alone"


def _volume(source: str | io.BytesIO, told: str) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """An array, where it lies (NIfTI), and whether its last axis is of volumes."""
    with open(source, "rb") if isinstance(source, str) else io.BytesIO(source.getvalue()) as file:
        start = file.read(8)
    if is_npy(start):
        array = open_npy(source, told=told, error=ResponseError)
        if array.size > MOST_VALUES:
            raise ResponseError(f"{told} holds {array.size:,} values, more than {MOST_VALUES:,}", remedy="split it")
        return array, None, False
    packed = start.startswith(b"\x1f\x8b")
    if not packed and not _sizes(start) & {_NIFTI_1, _NIFTI_2}:
        raise ResponseError(f"{told} is of no format of responses that is read", remedy="NPY and NIfTI are")
    try:
        nibabel: Any = import_module("nibabel")  # an extra
    except ImportError as error:
        raise ResponseError(f"{told} is NIfTI, which needs the package nibabel: {error}", remedy=INSTALL) from None
    try:
        with _unpacked(source, packed) as file:
            sizes = _sizes(file.read(4))
            file.seek(0)
            # by content, since the library goes by names
            image = (nibabel.Nifti2Image if _NIFTI_2 in sizes else nibabel.Nifti1Image).from_stream(file)
            shape = tuple(map(int, image.shape))
            if int(np.prod(shape, dtype=np.int64)) > MOST_VALUES:
                raise ResponseError(f"{told} holds {shape} values, more than {MOST_VALUES:,}", remedy="split it")
            values = np.asarray(image.dataobj, dtype=np.float32)
    except ResponseError:
        raise
    except Exception as error:  # HeaderDataError, ImageFileError, EOFError, BadGzipFile, zlib.error, OSError ...
        raise ResponseError(f"{told} is truncated or corrupt NIfTI: {error or type(error).__name__}") from None
    values = values.reshape([*shape[:3], *(size for size in shape[3:] if size > 1)])
    if values.ndim > 4 or (values.ndim == 4 and values.shape[:3] == (1, 1, 1)):  # CIFTI puts no volumes into NIfTI
        raise ResponseError(
            f"{told} has the shape {shape}, which is neither a volume nor a series of them",
            remedy="save its values as NPY, (voxels,) or (repeats, voxels)",
        )
    return values, image.affine, values.ndim > 3


def _unpacked(source: str | io.BytesIO, packed: bool) -> BinaryIO | gzip.GzipFile:
    """The file, decompressed where it is packed."""
    if packed:
        return gzip.open(source)
    return open(source, "rb") if isinstance(source, str) else source


def _sizes(start: bytes) -> set[int]:
    """What a header may say that its size is, in either order of bytes."""
    return {int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")}
