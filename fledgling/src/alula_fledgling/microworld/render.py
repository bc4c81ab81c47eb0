"""Pixels of a scene: anti-aliased, the same on every platform.

Coverage is counted on a grid of 8 x 8 sub-pixels with integer arithmetic and the colours are blended in integers, so no
rounding mode, math library or font can change a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from alula_fledgling.microworld.scenes import AnyScene, Scene

IMAGE_SIZE = 40
"""Width and height of a picture in pixels."""

SUB_PIXELS = 8
"""Sub-pixels per pixel and axis"""
SHAPE_BOX = 14
"""Pixels, both ways, of the box that a shape is drawn in"""
_DIAMETER = {"small": 8, "large": 12}
CENTRES = (7, 20, 33)  # of the grid's rows and columns, in pixels

INK = {
    "red": (214, 40, 40),
    "green": (34, 160, 60),
    "blue": (40, 90, 220),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 180),
    "orange": (245, 130, 20),
    # not asked about: numbers are written in the first two, towers learn shapes from the others too
    "black": (10, 10, 12),
    "white": (250, 250, 250),
    "cyan": (20, 200, 210),
    "pink": (245, 130, 190),
    "brown": (130, 80, 40),
    "grey": (130, 130, 130),
}
BACKGROUNDS = ((246, 245, 240), (196, 200, 204), (72, 78, 88), (18, 18, 22))

# 5 x 7 digits, one string of rows each
_GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
_DIGIT_UNIT = (12, 14, 15)  # sub-pixels per glyph cell for each scale
_BOLD = 4  # sub-pixels added to every stroke
_DIGIT_PITCH = 13  # pixels from one digit to the next


@dataclass(frozen=True)
class SceneImage:
    """A picture that is drawn only when asked for; equal scenes give equal pixels. Cheap to hold, hash and pickle."""

    scene: AnyScene

    def load(self) -> Image.Image:
        """The picture, RGB, ``IMAGE_SIZE`` pixels square."""
        return render(self.scene)


def render(scene: AnyScene) -> Image.Image:
    """Draw ``scene`` as an RGB image of ``IMAGE_SIZE`` pixels square."""
    return Image.fromarray(render_array(scene))


def render_array(scene: AnyScene) -> np.ndarray:
    """Draw ``scene`` as uint8 pixels ``(IMAGE_SIZE, IMAGE_SIZE, 3)``."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.int32)
    canvas[:] = BACKGROUNDS[scene.background]
    centres = centre_pixels(scene)
    if isinstance(scene, Scene):
        for thing, (x, y) in zip(scene.things, centres, strict=True):
            blend(canvas, shape_coverage(thing.shape, thing.size), x, y, INK[thing.colour])
    else:
        for digit, (x, y) in zip(scene.digits, centres, strict=True):
            blend(canvas, _digit_coverage(int(digit), scene.scale), x, y, INK[scene.ink])
    return canvas.astype(np.uint8)


def centre_pixels(scene: AnyScene) -> list[tuple[int, int]]:
    """Column and row of the pixel each thing or digit of ``scene`` is centred at, in the scene's order."""
    if isinstance(scene, Scene):
        return [(CENTRES[thing.column] + thing.shift[0], CENTRES[thing.row] + thing.shift[1]) for thing in scene.things]
    right, down = scene.shift
    if len(scene.digits) == 3:  # three digits fill the row
        right = 0
    start = IMAGE_SIZE // 2 - _DIGIT_PITCH * (len(scene.digits) - 1) // 2 + right
    return [(start + _DIGIT_PITCH * place, IMAGE_SIZE // 2 + down) for place in range(len(scene.digits))]


def blend(canvas: np.ndarray, coverage: np.ndarray, x: int, y: int, ink: tuple[int, int, int]) -> None:
    """Lay ``ink`` over the canvas where ``coverage`` (H, W; 0..64) says, centred at pixel (x, y)."""
    height, width = coverage.shape
    top, left = y - height // 2, x - width // 2
    # a digit may lean over the edge by a pixel of empty coverage
    rows = slice(max(top, 0), min(top + height, IMAGE_SIZE))
    columns = slice(max(left, 0), min(left + width, IMAGE_SIZE))
    part = coverage[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
    full = SUB_PIXELS * SUB_PIXELS
    canvas[rows, columns] = (canvas[rows, columns] * (full - part) + np.array(ink) * part + full // 2) // full


def _count(mask: np.ndarray) -> np.ndarray:
    """Sub-pixels inside, per pixel: (H * 8, W * 8) bool -> (H, W) of 0..64."""
    height, width = mask.shape[0] // SUB_PIXELS, mask.shape[1] // SUB_PIXELS
    return mask.reshape(height, SUB_PIXELS, width, SUB_PIXELS).sum(axis=(1, 3), dtype=np.int32)


@cache
def shape_coverage(shape: str, size: str) -> np.ndarray:
    """Coverage of a shape in a box of 14 x 14 pixels, centred."""
    return _count(shape_mask(shape, size))


@cache
def shape_mask(shape: str, size: str) -> np.ndarray:
    """Which sub-pixels of a shape's box, centred, are inside of it; bool."""
    box = SHAPE_BOX * SUB_PIXELS
    # odd coordinates of sub-pixel centres, so that 0 is the middle and everything stays an integer
    axis = np.arange(box, dtype=np.int64) * 2 + 1 - box
    y, x = axis[:, None], axis[None, :]
    radius = _DIAMETER[size] * SUB_PIXELS  # in half sub-pixels, as the axes
    squared = x * x + y * y
    if shape == "circle":
        inside = squared <= radius * radius
    elif shape == "square":
        side = radius * 9 // 10
        inside = (abs(x) <= side) & (abs(y) <= side)
    elif shape == "triangle":
        inside = (y <= radius * 9 // 10) & (2 * abs(x) <= y + radius)
    elif shape == "cross":
        arm = radius * 3 // 10
        inside = ((abs(x) <= arm) & (abs(y) <= radius)) | ((abs(y) <= arm) & (abs(x) <= radius))
    elif shape == "ring":
        hole = radius * 11 // 20
        inside = (squared <= radius * radius) & (squared >= hole * hole)
    elif shape == "heart":
        lobe = radius // 2
        off = radius - lobe
        lobes = (abs(x) - off) ** 2 + (y + radius // 3) ** 2 <= (lobe + radius // 16) ** 2
        point = (y >= -radius // 3) & (abs(x) * 20 <= (radius - y) * 16) & (abs(x) <= radius)
        inside = lobes | point
    else:
        raise ValueError(f"no drawing for shape {shape!r}")
    return np.broadcast_to(inside, (box, box))


@cache
def _digit_coverage(digit: int, scale: int) -> np.ndarray:
    """Coverage of a digit in a box of 12 x 16 pixels, centred."""
    unit = _DIGIT_UNIT[scale]
    glyph = np.array([[c == "1" for c in row] for row in _GLYPHS[digit].split()])
    big = glyph.repeat(unit, axis=0).repeat(unit, axis=1)
    mask = np.zeros((16 * SUB_PIXELS, 12 * SUB_PIXELS), dtype=bool)
    top, left = (mask.shape[0] - big.shape[0] - _BOLD) // 2, (mask.shape[1] - big.shape[1] - _BOLD) // 2
    for right in range(_BOLD + 1):
        for down in range(_BOLD + 1):
            mask[top + down :, left + right :][: big.shape[0], : big.shape[1]] |= big
    return _count(mask)
