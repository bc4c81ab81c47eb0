"""Lost items to the left, gained items to the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alula.reports.figures.canvas import Canvas, nice_step, text_width
from alula.reports.palette import colour

WIDTH = 560
_ROW, _TOP, _FONT = 40, 48, 13.0


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
    height = _TOP + _ROW * len(sides) + 14
    canvas = Canvas(WIDTH, height)
    most = max([1.0, *(v for s in sides for v in (s.lost, s.gained, *(r for pair in s.repeats for r in pair)))])
    limit = nice_step(most)
    number = 44  # room for the figures at the ends of the bars
    middle = left + (WIDTH - left) / 2
    unit = (middle - left - number) / limit
    canvas.text(middle - 10, 22, "lost", "end", class_="title")
    canvas.text(middle + 10, 22, "gained", "start", class_="title")
    canvas.text(middle, 38, f"items of {sides[0].n}", "middle", class_="tick")
    for row, side in enumerate(sides):
        at = _TOP + _ROW * row + _ROW / 2
        canvas.text(left - 14, at + 4.5, side.label, "end", fill=colour(side.series), class_="label")
        for value, sign, name in ((side.lost, -1, "loss"), (side.gained, 1, "gain")):
            width = unit * value
            canvas.open(hint=f"{side.label}: {value:.3g} {'lost' if sign < 0 else 'gained'} of {side.n}")
            canvas.add(
                "rect", x=middle - width if sign < 0 else middle, y=at - 11, width=width, height=22.0, class_=name
            )
            reach = max([value, *(pair[0 if sign < 0 else 1] for pair in side.repeats)])
            canvas.text(
                middle + sign * (unit * reach + 10), at + 4.5, f"{value:.3g}", "end" if sign < 0 else "start", class_="value"
            )
            canvas.close()
            for pair in side.repeats:
                canvas.add("circle", cx=middle + sign * unit * pair[0 if sign < 0 else 1], cy=at, r=2.6, class_="single")
    canvas.line(middle, _TOP - 4, middle, height - 10, class_="axis")
    return canvas.svg(title)
