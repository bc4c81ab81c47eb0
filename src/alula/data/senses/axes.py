"""Which way stored values point: ``"xyz"``, or another order and other signs, as ``"xz-y"``."""

from __future__ import annotations

import re

import numpy as np

from alula.data.errors import BadSampleError
from alula.errors import quoted

_AXIS = re.compile(r"(-?)([xyz])")


def check_axes(axes: object, error: type[BadSampleError]) -> None:
    """Refuse what names no three axes.

    Raises:
        BadSampleError: of the class ``error``.
    """
    found = _AXIS.findall(axes) if isinstance(axes, str) else []
    if sorted(letter for _, letter in found) != ["x", "y", "z"] or "".join(map("".join, found)) != axes:
        raise error(
            f"axes: {quoted(axes, 40)} does not say where three axes are",
            remedy='name each once, in the order in which they are stored, with - before one that is reversed: "xz-y"',
        )


def turned(vectors: np.ndarray, axes: str) -> np.ndarray:
    """Vectors (..., 3) as they are stored -> (..., 3) x, y, z."""
    if axes == "xyz":
        return vectors
    found = _AXIS.findall(axes)
    order = [[letter for _, letter in found].index(letter) for letter in "xyz"]
    signs = np.array([-1.0 if found[place][0] else 1.0 for place in order], dtype=vectors.dtype)
    return vectors[..., order] * signs


def handedness(axes: str) -> float:
    """1 where stored axes can be turned into ours, -1 where they are a mirror of ours, which turns rotations round."""
    return float(np.sign(np.linalg.det(turned(np.eye(3), axes))))
