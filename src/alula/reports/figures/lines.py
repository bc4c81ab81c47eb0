"""Values over layers or any other steps: a line per series on plain axes, with its band of uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from alula.reports.figures.canvas import Canvas, Scale, apart, spread, text_width
from alula.reports.figures.frame import frame
from alula.reports.figures.markers import marker_path
from alula.reports.palette import colour

WIDTH, HEIGHT = 560, 360
_LEFT, _TOP, _BOTTOM = 58, 44, 54
_FONT = 13.0
_MOST_MARKERS = 24


@dataclass(frozen=True)
class Line:
    """One series: its values over the figure's xs; ``bands`` are (low, high) per value; ``dashed`` sets it apart.

    An undefined value (NaN) is passed over, and so is an undefined bound.
    """

    label: str
    series: int
    values: Sequence[float]
    bands: Sequence[tuple[float, float]] = ()
    dashed: bool = False


def lines(
    xs: Sequence[float],
    found: Sequence[Line],
    *,
    title: str,
    x_title: str,
    y_title: str,
    y_format: Callable[[float], str] = lambda value: f"{value:g}",
    null: Sequence[tuple[float, float]] = (),
    least: float = 1e-9,
) -> str:
    """Return the figure as SVG; labels stand at the lines' ends.

    Args:
        null: per x, the (low, high) that a null reaches: a grey area.
        least: smallest height of the value axis.
    """
    right = 22 + max(text_width(line.label, _FONT) for line in found)
    bounds = [bound for line in found for band in line.bands for bound in band] + [bound for b in null for bound in b]
    values = [v for v in (*(v for line in found for v in line.values), *bounds) if math.isfinite(v)]
    low, high = spread(values, 0.08, least=least)
    if min(values) >= 0:
        low = max(low, 0.0)  # shares and lengths have a floor that an axis should not dig under
    x = Scale(*spread(xs, 0.02), _LEFT, WIDTH - right, whole=all(float(at).is_integer() for at in xs))
    y = Scale(low, high, HEIGHT - _BOTTOM, _TOP)
    canvas = Canvas(WIDTH, HEIGHT)
    frame(canvas, x, y, x_title=x_title, y_title=y_title, x_format=lambda value: f"{value:g}", y_format=y_format)
    _area(canvas, x, y, xs, null, class_="null")
    for line in found:
        _area(canvas, x, y, xs, line.bands, fill=colour(line.series), class_="band")
    if low < 0 < high:
        canvas.line(x.start, y(0), x.end, y(0), class_="axis")
    drawn = [(line, [(px, py) for px, py in zip(xs, line.values, strict=True) if math.isfinite(py)]) for line in found]
    drawn = [(line, points) for line, points in drawn if points]
    ends = [y(points[-1][1]) for _, points in drawn]
    for (line, points), end, at in zip(drawn, ends, apart(ends, _TOP, HEIGHT - _BOTTOM), strict=True):
        path = "M" + "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py in points)
        canvas.add("path", d=path, stroke=colour(line.series), class_="curve dashed" if line.dashed else "curve")
        for px, py in points:
            canvas.open(hint=f"{line.label}, {px:g}: {y_format(py)}")
            shape = marker_path(line.series, x(px), y(py), 3.2)
            # where dots would hide the line, they are there to be pointed at only
            seen: dict[str, Any] = {} if len(points) <= _MOST_MARKERS and not line.dashed else {"opacity": 0}
            canvas.add("path", d=shape, fill=colour(line.series), class_="dot", **seen)
            canvas.close()
        canvas.line(x(points[-1][0]) + 6, end, x.end + 9, at, class_="leader")
        canvas.text(x.end + 12, at + 4, line.label, fill=colour(line.series), class_="label")
    return canvas.svg(title)


def _area(
    canvas: Canvas, x: Scale, y: Scale, xs: Sequence[float], bands: Sequence[tuple[float, float]], **style: str
) -> None:
    """Fill what lies between the bounds, where both are known."""
    if not bands:
        return
    known = [(at, low, high) for at, (low, high) in zip(xs, bands, strict=True) if math.isfinite(low + high)]
    if len(known) < 2:
        return
    upper = [f"{x(at):.1f} {y(high):.1f}" for at, _, high in known]
    lower = [f"{x(at):.1f} {y(low):.1f}" for at, low, _ in known]
    canvas.add("path", d="M" + "L".join([*upper, *reversed(lower)]) + "Z", **style)
