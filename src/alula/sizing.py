"""Budgets of pixels for single images, as data for Qwen-VL and its like give them beside an image."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from alula.errors import UsageError


@dataclass(frozen=True)
class Sizing:
    """How large an image is to be for the model.

    Args:
        min_pixels, max_pixels: bounds of its height times its width; of those left out the processor's.
        resized_height, resized_width: its size in pixels, which the processor rounds to whole tokens. Both or none.

    Raises:
        UsageError: a value that is no whole number above 0, bounds that leave nothing, one side without the other, or
            a size beside bounds.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    def __post_init__(self) -> None:
        given = self.given()
        for name, value in given.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} is {value!r:.40}, not a whole number above 0", where="image")
        sides = {"resized_height", "resized_width"} & given.keys()
        if len(sides) == 1:
            raise UsageError(f"{min(sides)} is given alone", where="image", remedy="give the other side, too")
        if sides and len(given) > 2:
            raise UsageError("a size and bounds of pixels are given", where="image", remedy="keep one of them")
        if (self.min_pixels or 0) > (self.max_pixels or self.min_pixels or 0):
            raise UsageError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}", where="image")

    def given(self) -> dict[str, int]:
        """What was said, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


KEYS = tuple(Sizing.__dataclass_fields__)
"""what an image part may say"""
