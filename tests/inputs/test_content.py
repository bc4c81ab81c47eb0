"""What tells one picture from another, whatever mode its pixels are in, and what is seen of it."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alula.data import ImageRef
from alula.evaluation.prompts import loaded
from alula.inputs import Intake
from alula.inputs.intake import content_bytes
from alula.sizing import Sizing
from tests.hosts import tiny

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


def oriented() -> Image.Image:
    """Two pixels beside each other, which a camera says stand below each other."""
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    turned = Image.Exif()
    turned[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=turned)
    return Image.open(file)


def clear() -> Image.Image:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (9, 8, 7, 255))
    return image


@pytest.mark.parametrize(
    ("image", "pixels"),
    [
        (oriented(), [[(255, 0, 0)], [(0, 0, 255)]]),
        (clear(), [[(255, 255, 255), (9, 8, 7)]]),
        (Image.new("I;16", (1, 1), 0x8080), [[(128, 128, 128)]]),
        (Image.new("RGB", (1, 1), "red"), [[(255, 0, 0)]]),
    ],
)
def test_pictures_are_asked_about_as_they_are_learned_from(image: Image.Image, pixels: list[list[Any]]) -> None:
    """Of evaluations and of training, one way to pixels, also for those that were decoded before."""
    intake = Intake(tiny.tokenizer())
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]
    once = loaded(messages, intake)
    for found in (once, loaded(once, intake)):
        assert np.asarray(found[0]["content"][0]["image"]).tolist() == np.array(pixels).tolist()
        assert found[0]["content"][1] == messages[0]["content"][1]
    assert image.mode in ("RGB", "RGBA", "I;16")  # what was given is as it was


def test_a_budget_of_pixels_stays_beside_a_picture_that_is_loaded_again() -> None:
    intake, sizing = Intake(tiny.tokenizer()), Sizing(max_pixels=400)
    image = replace(ImageRef.from_object(clear()), sizing=sizing)
    once = loaded([{"role": "user", "content": [{"type": "image", "image": image}]}], intake)
    (part,) = loaded(once, intake)[0]["content"]
    assert part["sizing"] == sizing
    assert part["image"].mode == "RGB"
