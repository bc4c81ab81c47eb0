"""Values on a grid in files: PNG and TIFF (Pillow), EXR (`OpenEXR`), NPY. Sizes are judged before values are read."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from alula.data.errors import BadSampleError
from alula.data.senses.arrays import is_npy, open_npy
from alula.data.senses.point_files import INSTALL

_EXR = b"\x76\x2f\x31\x01"
_LAYERS = ("x", "y", "z"), ("r", "g", "b")


@dataclass(frozen=True)
class Raster:
    """What a file holds.

    Args:
        values: (H, W), or (H, W, C).
        is_lossy: whether it was compressed with loss.
    """

    values: np.ndarray
    is_lossy: bool = False


def read_raster(
    source: str | io.BytesIO,
    *,
    told: str,
    error: type[BadSampleError],
    max_pixels: int,
    channels: int,
    channel: str | None = None,
) -> Raster:
    """Read a grid of values.

    Args:
        source: path, or content.
        told: what messages call it.
        error: the class of errors.
        max_pixels: height x width above which it is refused.
        channels: how many values of a place are wanted, 1 or 3.
        channel: of an EXR with several, the one that is meant.

    Raises:
        BadSampleError: a format that is not read, a package that is not installed, or a file that is truncated,
            corrupt, too large or without such channels.
    """
    if isinstance(source, str):
        with open(source, "rb") as file:
            start = file.read(8)
    else:
        start = source.getvalue()[:8]
    if channel is not None and not start.startswith(_EXR):
        raise error(f"{told} is no EXR: it has no channels with names", remedy="leave `channel` out")
    if start.startswith(_EXR):
        return Raster(_exr(source, told, error, max_pixels, channels, channel))
    if is_npy(start):
        array = open_npy(source, told=told, error=error)
        check_size(array.shape, told, error, max_pixels, channels)
        return Raster(np.asarray(array))
    return _picture(source, told, error, max_pixels)


def check_size(shape: tuple[int, ...], told: str, error: type[BadSampleError], most: int, channels: int) -> None:
    """Refuse an array that is not (H, W), for one channel, or (H, W, 3), or has too many places.

    Raises:
        BadSampleError: of the class ``error``, with what to do about it.
    """
    wanted = "(height, width)" if channels == 1 else "(height, width, 3)"
    is_map = len(shape) == 2 if channels == 1 else len(shape) == 3 and shape[-1] == channels
    if not is_map:
        first = len(shape) == 3 and shape[0] == channels
        way = "FILE, array[0]" if channels == 1 else "FILE, numpy.moveaxis(array, 0, -1)"
        raise error(
            f"{told} has the shape {shape}, not {wanted}",
            remedy=f"channels come last: numpy.save({way})" if first else f"save {wanted}",
        )
    _check_pixels(shape[1], shape[0], told, error, most)


def _check_pixels(width: int, height: int, told: str, error: type[BadSampleError], most: int) -> None:
    if not width or not height:
        raise error(f"{told} holds no values: {width} x {height}")
    if width * height > most:
        raise error(
            f"{told} has {width} x {height} = {width * height:,} pixels, more than the limit of {most:,}",
            remedy="scale it down, or raise max_pixels if the file is to be trusted",
        )


def _picture(source: str | io.BytesIO, told: str, error: type[BadSampleError], most: int) -> Raster:
    try:
        with Image.open(source) as image:
            _check_pixels(image.width, image.height, told, error, most)
            if image.mode not in ("1", "L", "I", "F", "RGB", "RGBA") and not image.mode.startswith("I;16"):
                raise error(
                    f"{told} is a picture of mode {image.mode}", remedy="save gray or RGB, without transparency"
                )
            return Raster(np.asarray(image), image.format in ("JPEG", "WEBP"))
    except BadSampleError:
        raise
    except UnidentifiedImageError:
        raise error(
            f"{told} is corrupt or of no format that is read", remedy="PNG, TIFF, EXR and NPY are; save it as one"
        ) from None
    except Exception as refused:  # decoders raise anything
        raise error(f"{told} is truncated or corrupt: {refused}") from None


# -- EXR --------------------------------------------------------------------------------------------------------------


def _exr(
    source: str | io.BytesIO,
    told: str,
    error: type[BadSampleError],
    most: int,
    channels: int,
    channel: str | None,
) -> np.ndarray:
    try:
        openexr: Any = import_module("OpenEXR")  # an extra
    except ImportError as missing:
        raise error(f"{told} is EXR, which needs the package OpenEXR: {missing}", remedy=INSTALL) from None
    with _file(source) as path:
        try:
            with openexr.File(path, header_only=True) as file:
                windows = {name: np.array(file.header()[name]) for name in ("dataWindow", "displayWindow")}
            for low, high in windows.values():
                width, height = (int(side) for side in high - low + 1)
                _check_pixels(width, height, told, error, most)
            with openexr.File(path, separate_channels=True) as file:
                held = {name: np.array(one.pixels) for name, one in file.channels().items()}
        except BadSampleError:
            raise
        except Exception as refused:  # RuntimeError, ValueError, IndexError ...
            raise error(f"{told} is truncated or corrupt EXR: {refused}") from None
    names = _wanted(sorted(held), channels, channel)
    low, high = windows["dataWindow"]
    if names is None or any(held[name].shape != tuple(high - low + 1)[::-1] for name in names):
        raise error(
            f"{told} has the channels {', '.join(sorted(held))}",
            remedy="say which is meant: channel: NAME" if channels == 1 else "name three of them X, Y and Z",
        )
    shown = [_displayed(held[name], **windows) for name in names]
    return shown[0] if channels == 1 else np.stack(shown, axis=-1)


def _displayed(values: np.ndarray, dataWindow: np.ndarray, displayWindow: np.ndarray) -> np.ndarray:
    """The view of a file that holds a part of it, or more than it: unknown where nothing is stored.

    Args:
        dataWindow, displayWindow: (2, 2) first and last column and row, as headers have them.
    """
    low, high = displayWindow
    if np.array_equal(dataWindow, displayWindow):
        return values
    found = np.full((high - low + 1)[::-1], np.nan if values.dtype.kind == "f" else 0, values.dtype)
    first, last = np.maximum(low, dataWindow[0]), np.minimum(high, dataWindow[1]) + 1
    if (first < last).all():
        (left, top), (right, bottom) = first - low, last - low
        (west, north), (east, south) = first - dataWindow[0], last - dataWindow[0]
        found[top:bottom, left:right] = values[north:south, west:east]
    return found


def _wanted(held: list[str], channels: int, channel: str | None) -> list[str] | None:
    """Names of the channels that are meant; None where that cannot be told."""
    last = {name: name.rpartition(".")[2].casefold() for name in held}  # layers come before: "depth.Z"
    if channel is not None:
        return [channel] if channel in held else None
    if channels == 1:
        named = [name for name in held if last[name] == "z"] if len(held) > 1 else held
        return named if len(named) == 1 else None
    for letters in _LAYERS:
        found = [[name for name in held if last[name] == letter] for letter in letters]
        if all(len(names) == 1 for names in found):
            return [names[0] for names in found]
    return None


@contextlib.contextmanager
def _file(source: str | io.BytesIO) -> Iterator[str]:
    """A path, which is all that OpenEXR opens."""
    if isinstance(source, str):
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "map.exr")
        with open(path, "wb") as file:
            file.write(source.getvalue())
        yield path
