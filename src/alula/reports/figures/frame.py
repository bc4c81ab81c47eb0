"""Axes shared by the figures with two numeric directions."""

from __future__ import annotations

from collections.abc import Callable

from alula.reports.figures.canvas import Canvas, Scale


def frame(
    canvas: Canvas,
    x: Scale,
    y: Scale,
    *,
    x_title: str,
    y_title: str,
    x_format: Callable[[float], str],
    y_format: Callable[[float], str],
) -> None:
    """Draw grid lines, tick labels and axis titles around the area the scales span (y runs upwards)."""
    left, right, bottom, top = x.start, x.end, y.start, y.end
    for value in y.ticks():
        canvas.line(left, y(value), right, y(value), class_="grid")
        canvas.text(left - 8, y(value) + 4, y_format(value), "end", class_="tick")
    for value in x.ticks():
        canvas.line(x(value), bottom, x(value), top, class_="grid")
        canvas.text(x(value), bottom + 18, x_format(value), "middle", class_="tick")
    canvas.line(left, bottom, right, bottom, class_="axis")
    canvas.text((left + right) / 2, bottom + 40, x_title, "middle", class_="title")
    canvas.text(left - 8, top - 14, y_title, "start", class_="title", dx="-34")
