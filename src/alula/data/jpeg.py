"""Whether all pixels of a JPEG can be decoded, told without decoding them.

A file of one sequential scan is walked by its markers: headers, entropy-coded data, end of image. Damage inside that
data is none to a decoder, which goes on with what it makes of it. A decoder fails where the data ends without the
marker of its end, and over tables that are missing or are none; these are tried on first lines of no data. Whatever
else there is (progressive, several scans, arithmetic coding, other markers) is not told here.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

_START, _SCAN, _END = 0xD8, 0xDA, 0xD9
_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset([0x01, *range(0xD0, 0xDA)])  # markers without a segment
_LINES = 8  # at least one row of blocks, at most all of those that are decoded together


class _Frame(NamedTuple):
    height_at: int
    height: int
    width: int
    components: int
    data_at: int = 0


def whole_pixels(data: bytes) -> int | None:
    """Pixels of a JPEG that Pillow decodes without an error; None where only decoding it can tell.

    Args:
        data: the whole file.
    """
    frame = _frame(data)
    if frame is None:
        return None
    lines = min(frame.height, _LINES).to_bytes(2, "big")
    head = data[: frame.height_at] + lines + data[frame.height_at + 2 : frame.data_at]
    return frame.width * frame.height if _begins(head, frame.width) else None


@lru_cache(maxsize=256)  # pictures of one size and encoder begin alike
def _begins(head: bytes, width: int) -> bool:
    """Whether headers are those of a JPEG whose first lines can be decoded."""
    try:
        with Image.open(io.BytesIO(head + bytes((0xFF, _END))), formats=("JPEG",)) as image:
            image.load()
            return image.format == "JPEG" and image.width == width
    except Exception:  # decoders raise anything; whoever decodes all of it says what is wrong
        return False


def _frame(data: bytes) -> _Frame | None:
    """The frame of a file of one sequential scan that ends with the end of the image."""
    if data[:2] != bytes((0xFF, _START)):
        return None
    at, frame = 2, None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _ALONE or length < 2 or at + 2 + length > len(data):
            return None
        if marker in _FRAMES:
            if marker not in _SEQUENTIAL or frame is not None or length < 8:
                return None
            height, width = (int.from_bytes(data[at + 5 + skip : at + 7 + skip], "big") for skip in (0, 2))
            frame = _Frame(at + 5, height, width, data[at + 9])
        at += 2 + length
        if marker == _SCAN:
            is_one = frame is not None and frame.height > 0 and data[at - length + 2] == frame.components
            return frame._replace(data_at=at) if frame is not None and is_one and _ends(data, at) else None
    return None


def _ends(data: bytes, at: int) -> bool:
    """Whether entropy-coded data from ``at`` on, with no marker but restarts in it, ends with the end of the image."""
    view = np.frombuffer(data, np.uint8, offset=at)
    behind = view[np.flatnonzero(view[:-1] == 0xFF) + 1]
    markers = behind[(behind != 0) & ((behind < 0xD0) | (behind > 0xD7))]
    return markers.size > 0 and int(markers[0]) == _END
