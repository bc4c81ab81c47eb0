"""Models in the plane of two figures: the checkpoints of one training joined by a line, the last one drawn large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alula.reports.figures.canvas import Canvas, Scale, spread
from alula.reports.figures.frame import frame
from alula.reports.figures.markers import marker_path
from alula.reports.palette import colour

WIDTH, HEIGHT = 560, 450
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 44, 54
_SMALL, _LARGE = 3.4, 6.2

Format = Callable[[float], str]


@dataclass(frozen=True)
class Trail:
    """One training: its checkpoints as (x, y), in order. ``series`` is its colour and marker."""

    label: str
    series: int
    points: Sequence[tuple[float, float]]


def trails(
    found: Sequence[Trail],
    *,
    title: str,
    x_title: str,
    y_title: str,
    start: tuple[float, float, str] | None = None,
    x_format: Format = lambda value: f"{value:g}",
    y_format: Format = lambda value: f"{100 * value:.6g}%",
) -> str:
    """Return the figure as SVG.

    Args:
        start: where all trainings began, (x, y) with its name.
    """
    points = [point for trail in found for point in trail.points] + ([start[:2]] if start else [])
    x = Scale(*spread((px for px, _ in points), 0.06, least=1e-6), _LEFT, WIDTH - _RIGHT)
    y = Scale(*spread((py for _, py in points), 0.08, least=1e-6), HEIGHT - _BOTTOM, _TOP)
    canvas = Canvas(WIDTH, HEIGHT)
    frame(canvas, x, y, x_title=x_title, y_title=y_title, x_format=x_format, y_format=y_format)
    for trail in found:
        if len(trail.points) > 1:
            path = "M" + "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py in trail.points)
            canvas.add("path", d=path, stroke=colour(trail.series), class_="faint")
    for trail in found:
        for number, (px, py) in enumerate(trail.points, start=1):
            last = number == len(trail.points)
            canvas.open(hint=f"{trail.label}, checkpoint {number}: {x_format(px)}, {y_format(py)}")
            shape = marker_path(trail.series, x(px), y(py), _LARGE if last else _SMALL)
            canvas.add("path", d=shape, fill=colour(trail.series), class_="dot", opacity=1.0 if last else 0.7)
            canvas.close()
    if start:
        px, py, name = start
        canvas.add("circle", cx=x(px), cy=y(py), r=7.5, class_="ring")
        side, anchor = (12, "start") if x(px) < WIDTH * 0.6 else (-12, "end")
        canvas.text(x(px) + side, y(py) - 8, name, anchor, class_="note")
    return canvas.svg(title)
