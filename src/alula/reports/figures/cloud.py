"""Points in the plane by kind, without axes: for projections, whose directions mean nothing by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from alula.reports.figures.canvas import Canvas, Scale, spread
from alula.reports.figures.markers import marker_path
from alula.reports.palette import colour

SIDE, _TOP = 220, 26


def cloud(points: Sequence[tuple[float, float]], series: Sequence[int], *, title: str) -> str:
    """Return the panel as SVG; both directions have one scale, so that distances can be compared."""
    canvas = Canvas(SIDE, SIDE + _TOP)
    canvas.text(2, 16, title, class_="title")
    canvas.add("rect", x=0.5, y=_TOP + 0.5, width=SIDE - 1.0, height=SIDE - 1.0, rx=6, class_="panel")
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    reach = max(high - low for low, high in (spread(xs, 0.0), spread(ys, 0.0))) / 2 * 1.12 or 1.0
    middle_x, middle_y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    across = Scale(middle_x - reach, middle_x + reach, 0, SIDE)
    up = Scale(middle_y - reach, middle_y + reach, SIDE + _TOP, _TOP)
    for (x, y), kind in zip(points, series, strict=True):
        path = marker_path(kind, across(x), up(y), 3.4)
        canvas.add("path", d=path, fill=colour(kind), fill_opacity=0.62)
    return canvas.svg(title)
