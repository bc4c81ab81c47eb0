"""Points in files: PLY (`plyfile`), LAS and LAZ (`laspy`), PCD (`pypcd4`) and NPY.

A file with more points than are wanted is thinned before it is read whole: of a binary file every k-th point is taken
as it is read. What cannot be thinned so (text, compressed PCD) is refused.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, BinaryIO

import numpy as np

from alula.data.errors import PointsError
from alula.data.senses.arrays import is_npy, open_npy

INSTALL = "pip install 'alula[senses]'"

_COLORS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))
_HEADER = 1 << 16
"""Longest header of a PLY or PCD file that is looked through, in bytes"""
_LISTS = 2_000_000
"""Most rows of lists (faces of a mesh) in a PLY file: they are parsed one by one"""
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Stored:
    """Points as a file has them.

    Args:
        places: float64 (N, 3).
        colors: (N, 3) as stored; None where there are none.
        full: what full brightness is stored as; None where the format leaves it open.
    """

    places: np.ndarray
    colors: np.ndarray | None = None
    full: float | None = None


def read_points(source: str | io.BytesIO, *, told: str, most: int) -> Stored:
    """Read a point cloud.

    Args:
        source: path, or content.
        told: what messages call it.
        most: points wanted at most.

    Raises:
        PointsError: a format that is not read, a package that is not installed, or a file that is truncated, corrupt,
            without coordinates, or too large.
    """
    start = _start(source)
    for magic, name, read in _FORMATS:
        if start.lstrip(b"\xef\xbb\xbf \n").startswith(magic):
            try:
                return read(source, told, most)
            except PointsError:
                raise
            except Exception as error:  # each library raises its own
                raise PointsError(f"{told} is truncated or corrupt {name}: {error or type(error).__name__}") from None
    if is_npy(start):
        return _npy(source, told, most)
    raise PointsError(
        f"{told} is of no format of points that is read",
        remedy="PLY, LAS, LAZ, PCD and NPY (points, 3 or 6) are; save it as one of them",
    )


def _start(source: str | io.BytesIO) -> bytes:
    if isinstance(source, str):
        with open(source, "rb") as file:
            return file.read(64)
    return source.getvalue()[:64]


def _package(name: str, form: str, told: str) -> Any:
    try:
        return import_module(name)  # an extra
    except ImportError as error:
        raise PointsError(f"{told} is {form}, which needs the package {name}: {error}", remedy=INSTALL) from None


def _step(count: int, most: int) -> int:
    return max(1, math.ceil(count / most))


def _too_many(told: str, count: int, most: int, form: str) -> PointsError:
    return PointsError(
        f"{told} holds {count:,} points as {form}, more than {most:,}",
        remedy="save it as binary PLY, PCD, LAS or NPY, which are thinned while they are read, or thin it yourself",
    )


# -- PLY --------------------------------------------------------------------------------------------------------------


def _ply(source: str | io.BytesIO, told: str, most: int) -> Stored:
    plyfile = _package("plyfile", "PLY", told)
    counts, lists, is_text = _ply_header(source, told)
    if "vertex" not in counts:
        raise PointsError(f"{told} has no element vertex; it has {', '.join(counts) or 'none'}")
    if is_text and counts["vertex"] > most:
        raise _too_many(told, counts["vertex"], most, "text")
    if lists > _LISTS:
        raise PointsError(f"{told} holds a mesh of {lists:,} faces", remedy="save its vertices alone")
    data = plyfile.PlyData.read(source, mmap=False if is_text or not isinstance(source, str) else "r")
    points = data["vertex"].data
    points = points[:: _step(len(points), most)]
    return _named(points, told)


def _ply_header(source: str | io.BytesIO, told: str) -> tuple[dict[str, int], int, bool]:
    """Rows of each element; rows that hold lists; whether all is text."""
    counts: dict[str, int] = {}
    with_lists: set[str] = set()
    form = name = ""
    for line in _header_lines(source, told, b"end_header"):
        words = line.split()
        if words[:1] == ["format"]:
            form = words[1]
        elif words[:1] == ["element"]:
            name = words[1]
            counts[name] = int(words[2])
        elif words[:2] == ["property", "list"]:
            with_lists.add(name)
    return counts, sum(counts[name] for name in with_lists), form == "ascii"


def _header_lines(source: str | io.BytesIO, told: str, last: bytes) -> list[str]:
    """The lines of a header, up to the one that begins with ``last``."""
    with open(source, "rb") if isinstance(source, str) else io.BytesIO(source.getvalue()) as file:
        lines = []
        for line in iter(lambda: file.readline(_HEADER), b""):
            lines.append(line.decode("latin-1").strip())
            if line.startswith(last):
                return lines
            if file.tell() > _HEADER:
                break
    raise PointsError(f"{told} is truncated: its header does not end")


_SPLATS = ("f_dc_0", "f_dc_1", "f_dc_2")
_CONSTANT = 0.28209479177387814
"""the spherical harmonic of degree 0"""


def _named(points: np.ndarray, told: str) -> Stored:
    """Points whose columns have names, in whatever case."""
    held = points.dtype.names or ()
    names = {name.casefold(): name for name in reversed(held)}
    missing = [axis for axis in "xyz" if axis not in names]
    if missing:
        raise PointsError(
            f"{told} has no {missing[0]!r}; it has {', '.join(held)}", remedy="name its coordinates x, y and z"
        )
    places = np.stack([np.asarray(points[names[axis]], dtype=np.float64) for axis in "xyz"], axis=1)
    found = next((color for color in _COLORS if {*color} <= names.keys()), None)
    if found is None:
        if not {*_SPLATS} <= names.keys():
            return Stored(places)
        # Gaussian splats: the constant term of spherical harmonics, about gray (Kerbl et al., 2023)
        terms = np.stack([np.asarray(points[names[name]], dtype=np.float64) for name in _SPLATS], axis=1)
        return Stored(places, np.clip(0.5 + _CONSTANT * terms, 0, 1), 1.0)
    colors = np.stack([np.asarray(points[names[name]]) for name in found], axis=1)
    return Stored(places, colors, _full(colors.dtype))


def _full(dtype: np.dtype) -> float | None:
    return {"u1": 255.0, "u2": 65535.0}.get(f"{dtype.kind}{dtype.itemsize}", 1.0 if dtype.kind == "f" else None)


# -- LAS --------------------------------------------------------------------------------------------------------------


def _las(source: str | io.BytesIO, told: str, most: int) -> Stored:
    laspy = _package("laspy", "LAS", told)
    places, colors, read = [], [], 0
    with laspy.open(source, closefd=isinstance(source, str)) as file:
        count = int(file.header.point_count)
        has_colors = "red" in file.header.point_format.dimension_names
        step = _step(count, most)
        for points in file.chunk_iterator(_CHUNK):
            taken = slice(-read % step, None, step)
            read += len(points)
            places.append(np.stack([np.asarray(axis)[taken] for axis in (points.x, points.y, points.z)], axis=1))
            if has_colors:
                named = (points.red, points.green, points.blue)
                colors.append(np.stack([np.asarray(color)[taken] for color in named], axis=1))
    if read < count:
        raise PointsError(f"{told} is truncated: {read:,} of {count:,} points")
    if not places:
        return Stored(np.empty((0, 3)))
    stored = np.concatenate(colors) if has_colors else None
    # colors have 16 bits there; many programs write 8 into them all the same
    full = None if stored is None else 255.0 if 0 < stored.max() <= 255 else 65535.0
    if stored is not None and not stored.any():  # formats with room for colors, written by programs without any
        stored = None
    return Stored(np.concatenate(places).astype(np.float64), stored, full)


# -- PCD --------------------------------------------------------------------------------------------------------------


def _pcd(source: str | io.BytesIO, told: str, most: int) -> Stored:
    pypcd4 = _package("pypcd4", "PCD", told)
    lines = _header_lines(source, told, b"DATA")
    header = pypcd4.MetaData.parse_header(lines)
    dtype, count, form = header.build_dtype(), int(header.points), header.data.value
    if header.data != pypcd4.Encoding.BINARY and count > most:
        raise _too_many(told, count, most, form)
    with open(source, "rb") if isinstance(source, str) else io.BytesIO(source.getvalue()) as file:
        _skip(file, len(lines))
        if header.data == pypcd4.Encoding.BINARY:
            points = _binary(file, source, dtype, count, told)
        elif header.data == pypcd4.Encoding.ASCII:
            # not by the package, which takes one space between two values and no other
            points = np.loadtxt(io.StringIO(file.read().decode("latin-1")), dtype, ndmin=1)
        else:
            file.seek(0)
            points = pypcd4.PointCloud.from_fileobj(file).pc_data
    if len(points) < count:
        raise PointsError(f"{told} is truncated: {len(points):,} of {count:,} points")
    points = points[:: _step(count, most)]
    stored = _named(points, told)
    packed = next((name for name in ("rgb", "rgba") if name in (points.dtype.names or ())), None)
    if stored.colors is None and packed is not None and points.dtype[packed].itemsize == 4:
        # one value of four bytes, kept as an integer or in the bits of a float: blue, green, red, alpha
        bits = np.ascontiguousarray(points[packed]).view(np.uint32)
        if not bits.any():  # floats that were written with too few digits to keep them
            return stored
        return Stored(stored.places, np.stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255], axis=1), 255.0)
    return stored


def _skip(file: BinaryIO, lines: int) -> None:
    for _ in range(lines):
        file.readline()


def _binary(file: BinaryIO, source: str | io.BytesIO, dtype: np.dtype, count: int, told: str) -> np.ndarray:
    begin, end = file.tell(), file.seek(0, io.SEEK_END)
    if end - begin < count * dtype.itemsize:
        raise PointsError(f"{told} is truncated: {(end - begin) // dtype.itemsize:,} of {count:,} points")
    if not count:
        return np.empty(0, dtype)
    if isinstance(source, str):
        return np.memmap(source, dtype, "r", begin, (count,))
    return np.frombuffer(source.getvalue(), dtype, count, begin)


# -- NPY --------------------------------------------------------------------------------------------------------------


def _npy(source: str | io.BytesIO, told: str, most: int) -> Stored:
    array = open_npy(source, told=told, error=PointsError)
    check_columns(array, told)
    return columns(array[:: _step(len(array), most)])


def check_columns(array: np.ndarray, told: str) -> None:
    """Refuse an array that is not (N, 3) or (N, 6).

    Raises:
        PointsError: with what to do about it.
    """
    if array.ndim == 2 and array.shape[1] in (3, 6):
        return
    turned = array.ndim == 2 and array.shape[0] in (3, 6)
    raise PointsError(
        f"{told} has the shape {array.shape}, not (points, 3) or (points, 6)",
        remedy="transpose it: numpy.save(FILE, array.T)" if turned else "keep x, y, z and red, green, blue of it",
    )


def columns(array: np.ndarray) -> Stored:
    """Points of an array (N, 3) or (N, 6)."""
    colors = array[:, 3:] if array.shape[1] == 6 else None
    return Stored(np.asarray(array[:, :3], dtype=np.float64), colors, None if colors is None else _full(colors.dtype))


_FORMATS: tuple[tuple[bytes, str, Callable[[str | io.BytesIO, str, int], Stored]], ...] = (
    (b"ply", "PLY", _ply),
    (b"LASF", "LAS", _las),
    (b"# .PCD", "PCD", _pcd),
    (b"VERSION", "PCD", _pcd),
)
