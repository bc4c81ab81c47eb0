"""Real handwriting: scikit-learn's digits as questions about pictures.

The data are the 1,797 test images of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998):
32 x 32 bitmaps counted down to 8 x 8 with values 0..16, copied into scikit-learn. The documentation says that they come
from 13 people who are not in UCI's training set, but names no writer per image.

What "held-out writers" can mean here. The file keeps its order, and its labels tell more than the documentation: one
sequence of 130 digits (three times 0 to 9, then the same 100 digits) comes back 14 times, each time complete or with up
to eight digits missing (a scan that failed to segment), and once with another digit in one place. That is one printed
form, filled in 14 times: `FORM_STARTS`. Each filling is one hand's. Since there are 14 fillings and 13 people, someone
seems to have filled in two; which two is not recorded. By nearest neighbours (same digit, pixel distance) the fillings
most alike are 7 and 11, 0 and 1, 9 and 10, 7 and 8, so these pairs are kept on one side. Held out are the fillings
`HELD_OUT_FORMS` (386 images): no image and, as far as the data can tell, no hand of the test split is in the training
split.

Pictures are `IMAGE_SIZE` square with one to three images side by side, enlarged by integer bilinear interpolation, in
the inks and on the backgrounds of the microworld's own numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from alula.draws import Draw
from alula.errors import UsageError
from alula_fledgling.microworld.items import Exchange, Item, Split, Target, assistant, user
from alula_fledgling.microworld.render import BACKGROUNDS, IMAGE_SIZE, INK
from alula_fledgling.microworld.scenes import NUMBER_INKS

DIGIT_FAMILIES = ("read", "row", "larger", "sum")
"""Read one digit; read a row of two or three as a number; the larger of two; their sum."""

FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
"""Index of the first image of each filling of the form."""

HELD_OUT_FORMS = (0, 1, 13)
"""The fillings of the test split."""

_QUESTIONS = {
    "read": ("Which digit is written here?", "Read the digit.", "What digit do you see?"),
    "row": ("What number is shown?", "Read the number.", "Which number is written here?"),
    "larger": ("Which of the two digits is larger?", "Name the larger digit."),
    "sum": ("What is the sum of the two digits?", "Add the two digits."),
}
_HEIGHT = {1: 32, 2: 18, 3: 12}  # pixels of each image in a picture of so many
_FULL = 16  # the darkest value of the data


@dataclass(frozen=True)
class DigitsImage:
    """A picture of handwritten digits, drawn when asked for.

    Attributes:
        images: indices into scikit-learn's data, left to right.
        ink, background: as of `microworld.scenes.NumberScene`.
    """

    images: tuple[int, ...]
    ink: str
    background: int

    def load(self) -> Image.Image:
        """The picture, RGB, ``IMAGE_SIZE`` pixels square."""
        size = _HEIGHT[len(self.images)]
        cover = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.int64)
        top = (IMAGE_SIZE - size) // 2
        gap = (IMAGE_SIZE - size * len(self.images)) // (len(self.images) + 1)
        for place, index in enumerate(self.images):
            left = gap + place * (size + gap)
            cover[top : top + size, left : left + size] = _enlarged(index, size)
        full = _FULL * 4 * size * size
        paper, ink = (np.array(colour, dtype=np.int64) for colour in (BACKGROUNDS[self.background], INK[self.ink]))
        blend = (paper * (full - cover[..., None]) + ink * cover[..., None] + full // 2) // full
        return Image.fromarray(blend.astype(np.uint8))

    def fingerprint(self) -> str:
        """What decides the pixels."""
        return f"digits {self.images} {self.ink} {self.background}"


@dataclass(frozen=True)
class DigitStream:
    """Items by position: position n is a pure function of split, seed and n.

    Attributes:
        split: ``"train"`` or ``"test"`` (held-out writers, see the module's text).
        seed: another seed, other items from the same images.
        families: members of `DIGIT_FAMILIES`, gone through in turn; all of them by default.
        n: number of items, or None for a stream without end.
    """

    split: Split = "train"
    seed: int = 0
    families: tuple[str, ...] = DIGIT_FAMILIES
    n: int | None = None

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise UsageError(f"the digits have no split {self.split!r}", remedy="use train or test")
        unknown = [family for family in self.families if family not in DIGIT_FAMILIES]
        if unknown or not self.families:
            named = repr(unknown[0]) if unknown else "nothing"
            raise UsageError(f"the digits cannot ask for {named}", remedy=f"choose from: {', '.join(DIGIT_FAMILIES)}")

    def __len__(self) -> int:
        if self.n is None:
            raise TypeError("this stream has no end")
        return self.n

    def __getitem__(self, index: int) -> Item:
        """The item at ``index``. Raises IndexError outside ``0..n-1``."""
        if index < 0 or (self.n is not None and index >= self.n):
            raise IndexError(index)
        family = self.families[index % len(self.families)]
        draw = Draw("digits", self.split, self.seed, index)
        exchange, images = _question(draw, family, self.split)
        background = draw.below(len(BACKGROUNDS))
        picture = DigitsImage(images, draw.choice(NUMBER_INKS[background]), background)
        return Item(
            id=f"digits-{self.split}-{self.seed}-{index}",
            kind="visual",
            family=family,
            split=self.split,
            messages=(user(exchange.question, picture), assistant(exchange.answer)),
            targets=(Target(1, family, "visual", exchange.answer),),
        )

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in (itertools.count() if self.n is None else range(self.n)))


def digit_items(
    n: int | None, *, split: Split, seed: int, families: tuple[str, ...] = DIGIT_FAMILIES
) -> Iterator[Item]:
    """Questions about handwritten digits, the families in turn."""
    return iter(DigitStream(split, seed, families, n))


def form_of(image: int) -> int:
    """Which filling of the form an image is from."""
    return sum(image >= start for start in FORM_STARTS) - 1


def images_of(split: Split) -> tuple[tuple[int, ...], ...]:
    """Indices into scikit-learn's data of a split's images, by digit."""
    return _pools(split == "test")


def _question(draw: Draw, family: str, split: Split) -> tuple[Exchange, tuple[int, ...]]:
    pools = images_of(split)
    if family == "read":
        digits = [draw.below(10)]
    elif family == "row":
        digits = [draw.below(10) for _ in range(draw.between(2, 3))]
    else:
        digits = draw.sample(range(10), 2) if family == "larger" else [draw.below(10), draw.below(10)]
    answer = {"larger": lambda: str(max(digits)), "sum": lambda: str(sum(digits))}.get(
        family, lambda: "".join(map(str, digits))
    )()
    return Exchange(draw.choice(_QUESTIONS[family]), answer), tuple(draw.choice(pools[digit]) for digit in digits)


@cache
def _data() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) with values 0..16, and their digits (1797,)."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    data = load_digits()
    return data.images.astype(np.int64), data.target.astype(np.int64)


@cache
def _pools(held_out: bool) -> tuple[tuple[int, ...], ...]:
    labels = _data()[1]
    return tuple(
        tuple(
            index
            for index in range(len(labels))
            if labels[index] == digit and (form_of(index) in HELD_OUT_FORMS) == held_out
        )
        for digit in range(10)
    )


def _enlarged(index: int, size: int) -> np.ndarray:
    """One image interpolated to (size, size), in units of 1 / (4 * size * size)."""
    rows = _interpolation(size)
    return rows @ _data()[0][index] @ rows.T


@cache
def _interpolation(size: int) -> np.ndarray:
    """Bilinear weights (size, 8) in units of 1 / (2 * size); every row adds to 2 * size."""
    weights = np.zeros((size, 8), dtype=np.int64)
    for place in range(size):
        position = min(max((2 * place + 1) * 8 - size, 0), 14 * size)  # of the pixel's middle, in 1 / (2 * size)
        low, part = divmod(position, 2 * size)
        weights[place, low] += 2 * size - part
        weights[place, min(low + 1, 7)] += part
    return weights
