"""Scenes: coloured things on a three by three grid, and numbers; what can be in a picture before any pixel is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alula.draws import Draw
from alula_fledgling.microworld.splits import split_of

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "heart")
SIZES = ("small", "large")
POSITIONS = (
    "top-left", "top", "top-right",
    "left", "centre", "right",
    "bottom-left", "bottom", "bottom-right",
)  # fmt: skip
NUM_BACKGROUNDS = 4
NUMBER_INKS = (
    ("black", "blue", "purple", "red", "green"),
    ("black", "blue", "purple", "red"),
    ("white", "yellow", "orange"),
    ("white", "yellow", "orange", "green", "red"),
)
"""Per background, the inks a number can be read in."""

UNSEEN_PAIRS = frozenset(
    {
        ("red", "ring"),
        ("green", "heart"),
        ("blue", "triangle"),
        ("yellow", "cross"),
        ("purple", "square"),
        ("orange", "circle"),
    }
)
"""Colour and shape combinations kept out of all visual training, the tower's included. Each colour and each shape
occurs once, so every part of an unseen combination is well known."""

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)


@dataclass(frozen=True)
class Thing:
    """One shape on the grid; ``cell`` counts the nine cells in reading order, ``shift`` moves it by whole pixels."""

    colour: str
    shape: str
    size: str
    cell: int
    shift: tuple[int, int] = (0, 0)

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def column(self) -> int:
        return self.cell % 3

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Things in reading order of their cells, before one of four backgrounds."""

    things: tuple[Thing, ...]
    background: int = 0

    @property
    def content(self) -> str:
        """What is to be seen, without what does not matter (shifts, background)."""
        return ";".join(f"{thing.full_name} {thing.cell}" for thing in self.things)


@dataclass(frozen=True)
class NumberScene:
    """A number of one to three digits, written in one row.

    Attributes:
        digits: the number as text.
        ink: name of the colour it is written in.
        background: one of the four backgrounds.
        scale: height of the digits, 0 (low) to 2 (tall).
        shift: whole pixels right and down from the middle.
    """

    digits: str
    ink: str
    background: int = 0
    scale: int = 1
    shift: tuple[int, int] = (0, 0)

    @property
    def content(self) -> str:
        return f"number {self.digits}"


AnyScene = Scene | NumberScene


def draw_scene(
    draw: Draw,
    count: int,
    *,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    alike: bool = False,
    first: tuple[str, str] | None = None,
) -> Scene:
    """Draw a scene of ``count`` things.

    Args:
        pairs: the colour and shape combinations it may use.
        alike: whether two things may look the same; else all combinations differ.
        first: a combination that must be among them.
    """
    if alike:
        looks = [draw.choice(pairs) for _ in range(count)]
        if count > 1 and draw.chance(0.6):  # counting is only interesting with something to count
            colour, shape = looks[0]
            for other in range(1, count):
                if draw.chance(0.5):
                    same = [p for p in pairs if (p[0] == colour) or (p[1] == shape)]
                    looks[other] = draw.choice(same)
    else:
        looks = draw.sample([pair for pair in pairs if pair != first], count)
    if first is not None:
        looks[0] = first
    cells = draw.sample(range(9), count)
    things = [
        Thing(colour, shape, draw.choice(SIZES), cell, (draw.between(-1, 1), draw.between(-1, 1)))
        for (colour, shape), cell in zip(looks, cells, strict=True)
    ]
    return Scene(tuple(sorted(things, key=lambda thing: thing.cell)), draw.below(NUM_BACKGROUNDS))


def draw_number(draw: Draw) -> NumberScene:
    """Draw a number of one to three digits; the lengths are equally likely."""
    length = draw.between(1, 3)
    digits = "".join(str(draw.below(10)) for _ in range(length))
    background = draw.below(NUM_BACKGROUNDS)
    ink = draw.choice(NUMBER_INKS[background])
    return NumberScene(digits, ink, background, draw.below(3), (draw.between(-2, 2), draw.between(-4, 4)))


def split_of_scene(scene: AnyScene) -> str:
    """``"train"`` or ``"test"`` by what is to be seen.

    There are only ten single digits, so those are told apart by how they are written as well.
    """
    if isinstance(scene, NumberScene) and len(scene.digits) == 1:
        return split_of("scene", scene)
    return split_of("scene", scene.content)
