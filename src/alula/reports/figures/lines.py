"""Values over layers or any other steps: a line per series on plain axes, with its band of uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alula.reports.figures.canvas import Canvas, Scale, apart, spread, text_width
from alula.reports.figures.frame import frame
from alula.reports.figures.markers import marker_path
from alula.reports.palette import colour

WIDTH, HEIGHT = 560, 360
_LEFT, _TOP, _BOTTOM = 58, 44, 54
_FONT = 13.0


@dataclass(frozen=True)
class Line:
    """One series: its values over the figure's xs; ``bands`` are (low, high) per value; ``dashed`` sets it apart."""

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
) -> str:
    """Return the figure as SVG; labels stand at the lines' ends."""
    right = 22 + max(text_width(line.label, _FONT) for line in found)
    values = [value for line in found for value in (*line.values, *(bound for band in line.bands for bound in band))]
    x = Scale(*spread(xs, 0.02), _LEFT, WIDTH - right)
    y = Scale(*spread(values, 0.08, least=1e-9), HEIGHT - _BOTTOM, _TOP)
    canvas = Canvas(WIDTH, HEIGHT)
    frame(canvas, x, y, x_title=x_title, y_title=y_title, x_format=lambda value: f"{value:g}", y_format=y_format)
    for line in found:
        if line.bands:
            upper = [f"{x(at):.1f} {y(high):.1f}" for at, (_, high) in zip(xs, line.bands, strict=True)]
            lower = [f"{x(at):.1f} {y(low):.1f}" for at, (low, _) in zip(xs, line.bands, strict=True)]
            area = "M" + "L".join([*upper, *reversed(lower)]) + "Z"
            canvas.add("path", d=area, fill=colour(line.series), opacity=0.16)
    ends = [y(line.values[-1]) for line in found]
    for line, end, at in zip(found, ends, apart(ends, _TOP, HEIGHT - _BOTTOM), strict=True):
        path = "M" + "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py in zip(xs, line.values, strict=True))
        dashes = {"stroke_dasharray": "5 4"} if line.dashed else {}
        canvas.add("path", d=path, stroke=colour(line.series), class_="curve", **dashes)
        for px, py in zip(xs, line.values, strict=True):
            canvas.open(hint=f"{line.label}, {px:g}: {y_format(py)}")
            canvas.add("path", d=marker_path(line.series, x(px), y(py), 3.2), fill=colour(line.series), class_="dot")
            canvas.close()
        canvas.line(x(xs[-1]) + 6, end, x.end + 9, at, class_="leader")
        canvas.text(x.end + 12, at + 4, line.label, fill=colour(line.series), class_="label")
    return canvas.svg(title)
