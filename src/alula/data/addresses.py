"""What records write where they name a medium: the name of a file, a ``file:`` or ``data:`` address, or base64."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote, unquote_to_bytes

from alula.errors import AlulaError, quoted

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_LETTERS = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_STARTS = {
    "image": ("iVBORw0KGgo", "/9j/", "_9j_", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk"),
    "video": ("iVBORw0KGgo", "R0lGOD", "UklGR"),
    "audio": ("UklGR", "ZkxhQ", "T2dnU", "SUQz", "__v", "//v", "__M", "//M"),
}
"""How files of each medium begin in base64: PNG, JPEG, GIF, WebP and WAV (RIFF), TIFF, BMP; FLAC, Ogg, MP3. Other media
are not told from names so."""
_SHORTEST = 64
"""Characters of base64 that no name of a file has by chance, and every picture."""


class AddressError(AlulaError):
    """What stands in the place of a medium is no file's name and holds none."""


def resolved(text: str, medium: str) -> str | bytes:
    """The name of the file that ``text`` means, or the content that it holds.

    Base64 is taken in lines, in either alphabet and without its padding, behind ``data:...;base64,`` or bare; bare, it
    has to begin as a file of that medium does.

    Args:
        text: not empty.
        medium: a name of `alula.media`.

    Raises:
        AddressError: a web address (alula downloads nothing), or broken base64.
    """
    found = _SCHEME.match(text)
    scheme = found[1].casefold() if found else ""
    if scheme == "data":
        kind, comma, content = text.partition(",")
        if not comma:
            raise AddressError(f"{medium} {quoted(text)} has no comma, behind which a data: address holds its content")
        if kind.rstrip().casefold().endswith(";base64"):
            return from_base64(unquote(content), medium)
        return unquote_to_bytes(content)
    if scheme == "file":
        rest = text[len("file:") :]
        rest = rest.removeprefix("//localhost") if rest.startswith("//localhost/") else rest.removeprefix("//")
        return unquote(rest)
    if found and text.startswith("//", found.end()):
        raise AddressError(
            f"{medium} {quoted(text)} is a web address", remedy="download it and give the path; alula fetches nothing"
        )
    if (
        len(text) >= _SHORTEST
        and text.lstrip().startswith(_STARTS.get(medium, ()))
        and _LETTERS.fullmatch(_joined(text))
    ):
        return from_base64(text, medium)
    return text


def from_base64(text: str, medium: str) -> bytes:
    """What ``text`` encodes.

    Raises:
        AddressError: it is no base64.
    """
    joined = _joined(text)
    if not _LETTERS.fullmatch(joined) or len(joined.rstrip("=")) % 4 == 1:
        raise AddressError(f"inline {medium} is not valid base64: {quoted(text, 60)}")
    letters = joined.rstrip("=").replace("-", "+").replace("_", "/")
    return base64.b64decode(letters + "=" * (-len(letters) % 4))


def _joined(text: str) -> str:
    return "".join(text.split())
