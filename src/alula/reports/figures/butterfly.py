"""Lost items to the left, gained items to the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alula.reports.figures.canvas import Canvas, text_width
from alula.reports.palette import colour

WIDTH = 560
_ROW, _TOP, _FONT = 36, 52, 13.0
_NUMBER = 48
"""room for the figure at the end of a bar"""


@dataclass(frozen=True)
class Sides:
    """Lost and gained items of one series, of ``n`` items; ``repeats`` are the (lost, gained) of single trainings."""

    label: str
    series: int
    lost: float
    gained: float
    n: int
    repeats: Sequence[tuple[int, int]] = ()


def butterfly(sides: Sequence[Sides], *, title: str) -> str:
    """Return the figure as SVG: bars are means over trainings, dots the single ones."""
    left = 18 + max(text_width(side.label, _FONT) for side in sides)
    height = _TOP + _ROW * len(sides) + 6
    canvas = Canvas(WIDTH, height)
    most_lost, most_gained = (max([1.0, *(_most(side, which) for side in sides)]) for which in (0, 1))
    # one scale for both directions, the axis where it gives both enough room
    unit = (WIDTH - left - 2 * _NUMBER) / (most_lost + most_gained)
    middle = min(max(left + _NUMBER + unit * most_lost, left + 60), WIDTH - 70)
    canvas.text(0, 16, title, class_="title")
    canvas.text(middle - 8, 42, "lost", "end", class_="tick")
    canvas.text(middle + 8, 42, "gained", class_="tick")
    for row, side in enumerate(sides):
        at = _TOP + _ROW * row + _ROW / 2
        canvas.text(left - 14, at + 4.5, side.label, "end", fill=colour(side.series), class_="label")
        _bar(canvas, side, 0, -unit, middle, at)
        _bar(canvas, side, 1, unit, middle, at)
    canvas.line(middle, _TOP - 4, middle, height - 4, class_="axis")
    return canvas.svg(title)


def _bar(canvas: Canvas, side: Sides, which: int, unit: float, middle: float, at: float) -> None:
    """Draw the lost (0) or gained (1) bar of a row with its dots and its figure."""
    value = (side.lost, side.gained)[which]
    tip = middle + unit * value
    canvas.open(hint=f"{side.label}: {value:.1f} of {side.n} {('lost', 'gained')[which]}")
    canvas.add(
        "rect", x=min(middle, tip), y=at - 10, width=abs(tip - middle), height=20.0, class_=("loss", "gain")[which]
    )
    for pair in side.repeats:
        canvas.add("circle", cx=middle + unit * pair[which], cy=at, r=2.6, class_="single")
    end = middle + unit * _most(side, which) + (8 if which else -8)
    shown = f"{value:.0f}" if value == round(value) else f"{value:.1f}"
    canvas.text(end, at + 4.5, shown, ("end", "start")[which], class_="value")
    canvas.close()


def _most(side: Sides, which: int) -> float:
    return max([(side.lost, side.gained)[which], *(pair[which] for pair in side.repeats)])
