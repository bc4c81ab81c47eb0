"""Arrays in NPY files: what they hold is known before any of it is read, and files are mapped, not loaded."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np

from alula.data.errors import BadSampleError

_MAGIC = b"\x93NUMPY"


def is_npy(start: bytes) -> bool:
    """Whether a file begins as an NPY file does; an NPZ archive is taken for one, so that it is told apart by name."""
    return start.startswith((_MAGIC, b"PK\x03\x04"))


def open_npy(source: str | io.BytesIO, *, told: str, error: type[BadSampleError]) -> np.ndarray:
    """The array of an NPY file, mapped from disk where it is one on disk.

    Raises:
        BadSampleError: of the class ``error``: an archive of several arrays, Python objects, complex numbers or texts,
            no values, or fewer than its header says.
    """
    mapped: Any = "r" if isinstance(source, str) else None
    try:
        array = np.load(source, mmap_mode=mapped, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as refused:
        pickled = "allow_pickle" in str(refused)
        raise error(
            f"{told} holds Python objects" if pickled else f"{told} is a truncated or corrupt NPY file: {refused}",
            remedy="save numbers: numpy.save(FILE, numpy.asarray(VALUES, dtype=numpy.float32))" if pickled else None,
        ) from None
    if not isinstance(array, np.ndarray):
        raise error(f"{told} is an archive of arrays (NPZ)", remedy="save the one that is meant: numpy.save")
    if array.dtype.kind not in "biuf":
        raise error(f"{told} holds {array.dtype}, no real numbers", remedy="save it as float32")
    if not array.size:
        raise error(f"{told} holds no values: its shape is {array.shape}")
    return array
