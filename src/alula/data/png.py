"""PNG files without their notes: texts and color profiles, whose size Pillow bounds and which say nothing of pixels."""

from __future__ import annotations

import struct

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NOTES = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})


def is_about_notes(error: Exception) -> bool:
    """Whether Pillow refuses a file for what its notes would take, not for its pixels."""
    return isinstance(error, ValueError) and "MAX_TEXT" in str(error)


def without_notes(data: bytes) -> bytes:
    """The file with its texts and color profile left out, everything else as it is."""
    kept, at = [_SIGNATURE], len(_SIGNATURE)
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if name not in _NOTES:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)
