"""What tells one picture from another, whatever mode its pixels are in."""

from __future__ import annotations

import itertools

import pytest
from PIL import Image

from alula.inputs.intake import content_bytes

MODES = ("1", "L", "LA", "I;16", "I", "F", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


def drawn(mode: str, value: int) -> Image.Image:
    image = Image.new(mode, (4, 3))
    image.putpixel((1, 1), value if len(image.getbands()) == 1 else (value,) * len(image.getbands()))
    return image


def told(image: Image.Image) -> bytes:
    return content_bytes({"type": "image", "image": image})


@pytest.mark.parametrize("mode", MODES)
def test_pixels_and_modes_tell_pictures_apart(mode: str) -> None:
    assert told(drawn(mode, 1)) == told(drawn(mode, 1))
    assert told(drawn(mode, 1)) != told(drawn(mode, 0))
    assert all(told(drawn(mode, 0)) != told(drawn(other, 0)) for other in MODES if other != mode)


def test_palettes_and_transparent_colors_do() -> None:
    """The same numbers of pixels, and other colors; the same colors, and others of them to be seen."""
    made = []
    for palette, transparency in itertools.product(
        ([255, 0, 0, 0, 255, 0], [0, 0, 255, 9, 9, 9]), (None, 1, bytes([9, 5]))
    ):
        image = Image.new("P", (4, 3), 1)
        image.putpalette(palette)
        if transparency is not None:
            image.info["transparency"] = transparency
        made.append(image)
    assert len({told(image) for image in made}) == len(made)
    plain, clear = drawn("RGB", 7), drawn("RGB", 7)
    clear.info["transparency"] = (7, 7, 7)
    assert told(plain) != told(clear)
