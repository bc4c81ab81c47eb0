"""Images as references: cheap to carry and pickle, decoded where they are needed, always to upright 8-bit RGB.

What becomes of each kind of picture (``to_rgb``):

=====================================  ====================================================================
stored as                              becomes
=====================================  ====================================================================
RGB, YCbCr, HSV, 1-bit, grey           RGB
CMYK                                   RGB by Pillow's formula (no colour management)
palette                                RGB; with transparency: composited on white
LA, RGBA, PA, premultiplied alpha      composited on white
16-bit grey                            scaled to 8 bits (65535 -> 255), not clipped
32-bit integer grey                    as 16-bit when all values fit in 0..65535, else ``ImageError``
floating point                         ``ImageError``: its white level is unknown
animated                               first frame
TIFF of several pages                  ``ImageError``
rotated by EXIF                        transposed upright (unreadable EXIF is taken as upright)
truncated, corrupt, empty, missing     ``ImageError``
more pixels than ``max_pixels``        ``ImageError``, before any pixel is decoded
=====================================  ====================================================================

No Pillow global is read for a decision or changed: two libraries in one process can disagree about limits.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from PIL import Image, UnidentifiedImageError

from alula.bounds import DEFAULT_MAX_PIXELS, HARD_MAX_PIXELS
from alula.data.errors import BadSampleError, ImageError
from alula.data.jpeg import whole_pixels
from alula.data.media import MediaRef
from alula.data.png import is_about_notes, without_notes
from alula.errors import UsageError
from alula.sizing import KEYS, Sizing

_EXIF_ORIENTATION = 0x0112
_SUBFILE, _REDUCED = 254, 1  # of a page of a TIFF: that it is another one in lower resolution
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@runtime_checkable
class Loadable(Protocol):
    """Anything that draws itself: ``load()`` returns a PIL image (a microworld scene is one)."""

    def load(self) -> Image.Image: ...


@dataclass(frozen=True, slots=True)
class ImageRef(MediaRef):
    """A picture not yet decoded. Make one with ``from_path``, ``from_bytes`` or ``from_object``.

    Attributes:
        max_pixels: width x height above which ``load`` refuses.
        sizing: how large the model is to see it; `load` leaves its size alone.
    """

    noun: ClassVar[str] = "image"
    error: ClassVar[type[BadSampleError]] = ImageError
    decoding: ClassVar[str] = "1"
    options: ClassVar[tuple[str, ...]] = KEYS

    max_pixels: int = DEFAULT_MAX_PIXELS
    sizing: Sizing | None = None

    @classmethod
    def fields_said(cls, said: Mapping[str, Any]) -> dict[str, Any]:
        """``sizing`` by its keys, of which one (``max_pixels``) is called as the limit is."""
        try:
            return {"sizing": Sizing(**said)} if said else {}
        except UsageError as error:
            raise ImageError(error.message, remedy=error.remedy) from None

    def said(self) -> dict[str, Any]:
        return {} if self.sizing is None else dict(self.sizing.given())

    @classmethod
    def from_object(cls, value: Any, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageRef:
        """A PIL image, an ``ImageRef`` (returned as it is), or anything with ``load()``.

        A loadable object may offer ``fingerprint() -> str``; without one its pixels are hashed when asked.

        Raises:
            ImageError: ``value`` is none of these.
        """
        if isinstance(value, ImageRef):
            return value
        if isinstance(value, Image.Image):  # before Loadable: PIL's own load() returns raw pixel access
            return cls(f"<{value.mode} image {value.width}x{value.height}>", maker=value.copy, max_pixels=max_pixels)
        if isinstance(value, Loadable):
            return cls._from_loadable(value, max_pixels=max_pixels)
        raise ImageError(
            f"an image cannot be made from {type(value).__name__}", remedy="give a PIL image or an alula.data.ImageRef"
        )

    def load(self) -> Image.Image:
        """Decode to an upright 8-bit RGB image that holds no file open.

        Raises:
            ImageError: for everything the module's table says.
        """
        if self.maker is not None:
            made = self.maker()
            if not isinstance(made, Image.Image):
                raise ImageError(f"{self.told}: its maker returned {type(made).__name__}, not a PIL image")
            return self._convert(made)
        source = self._stream()
        try:
            return self._opened(source)
        except ImageError:
            raise
        except UnidentifiedImageError:
            raise ImageError(f"{self.told} is corrupt or of a format that Pillow does not read") from None
        except Image.DecompressionBombError as error:
            raise ImageError(f"{self.told} is too large to open: {error}") from error
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, EOFError, struct.error, zlib.error
            raise ImageError(f"{self.told} is truncated or corrupt: {error}") from error

    def verify(self) -> None:
        """Raise what `load` would raise, without making the pixels where that can be told from less.

        Raises:
            ImageError: as `load`.
        """
        if self.maker is None:
            pixels = whole_pixels(self._encoded())
            if pixels is not None and pixels <= min(self.max_pixels, HARD_MAX_PIXELS):
                return
        self.load()

    def _opened(self, source: str | io.BytesIO) -> Image.Image:
        try:
            with Image.open(source) as image:
                return self._convert(image)
        except ValueError as error:
            if not is_about_notes(error):
                raise
        with Image.open(io.BytesIO(without_notes(self._encoded()))) as image:
            return self._convert(image)

    def _made(self) -> np.ndarray:
        return np.asarray(self.load())

    def _convert(self, image: Image.Image) -> Image.Image:
        pixels = image.width * image.height
        if pixels > self.max_pixels:
            raise ImageError(
                f"{self.told} has {image.width} x {image.height} = {pixels:,} pixels, "
                f"more than the limit of {self.max_pixels:,}",
                remedy="scale it down, or raise max_pixels if the file is to be trusted",
            )
        if (pages := _pages(image)) > 1:
            raise ImageError(
                f"{self.told} has {pages} pages", remedy="save the page that is meant, or each, as a file of its own"
            )
        try:
            # a JPEG that was opened here has its pixels, no file and no further frames: nobody else holds it
            return _rgb(image, is_ours=self.maker is None and image.format == "JPEG")
        except ImageError as error:
            raise ImageError(f"{self.told}: {error.message}", remedy=error.remedy) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to a fresh, upright, 8-bit RGB one; the module's table says how.

    Raises:
        ImageError: floating point pixels, or integers outside 0..65535.
    """
    return _rgb(image, is_ours=False)


def _rgb(image: Image.Image, *, is_ours: bool) -> Image.Image:
    """`to_rgb`; a picture that is ours is not copied."""
    image.load()  # before the orientation is read: Pillow turns TIFFs itself while loading
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode.startswith("I"):
        rgb = _scaled_16_bit(image).convert("RGB")
    elif image.mode == "F":
        raise ImageError("floating point pixels have no defined white level", remedy="store 8 or 16 bits per channel")
    elif image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        rgb = canvas.convert("RGB")
    elif image.mode == "RGB":
        rgb = image if is_ours else image.copy()
    else:
        rgb = image.convert("RGB")
    rgb = rgb.transpose(turn) if turn is not None else rgb
    rgb.info.clear()  # EXIF and text chunks have been used or do not matter; workers need not ship them
    return rgb


def _pages(image: Image.Image) -> int:
    """Pages of a TIFF, copies of lower resolution (thumbnails, pyramids) not counted; 1 of any other picture."""
    stored = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    if stored == 1:
        return 1
    found = 0
    for number in range(stored):
        image.seek(number)
        kind = image.tag_v2.get(_SUBFILE, 0)  # type: ignore[attr-defined]
        found += not (isinstance(kind, int) and kind & _REDUCED)
    image.seek(0)
    return found


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
    return value if isinstance(value, int) else 1


def _scaled_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"integer pixels from {values.min()} to {values.max()} have no defined white level",
            remedy="store 8 or 16 bits per channel",
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
