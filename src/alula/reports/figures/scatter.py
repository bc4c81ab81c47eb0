"""Points with intervals in both directions, their repetitions as faint dots, and labels that keep out of the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from alula.evaluation.results import Estimate
from alula.reports.figures.canvas import Canvas, Scale, spread, text_width
from alula.reports.figures.frame import frame
from alula.reports.figures.markers import marker_path
from alula.reports.palette import colour

SIZE = (560, 450)
"""width and height in pixels, enough for some seven points"""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 44, 54
_RADIUS, _FONT = 6.5, 13.0
_GAP = 5.0
"""left free at both ends of a label, since its width is known only about"""
_REACH = 0.6
"""intervals of shares are shown to their ends as far as this beyond the outermost points"""
_HEAD = 7.0
_STEP = 8.0
"""from box to box along a line that labels keep off"""


@dataclass(frozen=True)
class Point:
    """A point in fractions (1 = 100 %) with its intervals; ``repeats`` are the (x, y) of single trainings. A ``faint``
    one is small, without bars, and named only when it is pointed at."""

    label: str
    series: int
    x: Estimate
    y: Estimate
    repeats: Sequence[tuple[float, float]] = ()
    faint: bool = False


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_title: str,
    y_title: str,
    reference: tuple[float, str],
    size: tuple[int, int] = SIZE,
    through: Sequence[tuple[float, float]] = (),
) -> str:
    """Return the scatter plot as SVG.

    Args:
        points: at least one.
        reference: a y value to mark with a dashed line, and its name.
        through: (x, y) that a line leads through, behind the points.
        size: width and height in pixels.
    """
    x_low, x_high = _range([_extent(p, p.x) for p in points], [r[0] for p in points for r in p.repeats])
    y_low, y_high = _range(
        [_extent(p, p.y) for p in points], [*(r[1] for p in points for r in p.repeats), reference[0]]
    )
    x = Scale(x_low, x_high, _LEFT, size[0] - _RIGHT)
    y = Scale(y_low, y_high, size[1] - _BOTTOM, _TOP)
    canvas = Canvas(*size)
    frame(canvas, x, y, x_title=x_title, y_title=y_title, x_format=_percent, y_format=_percent)
    canvas.line(x.start, y(reference[0]), x.end, y(reference[0]), class_="reference")
    for point in points:
        for dot_x, dot_y in point.repeats:
            canvas.add(
                "path", d=marker_path(point.series, x(dot_x), y(dot_y), 3.2), fill=colour(point.series), opacity=0.4
            )
    if through:
        steps = "L".join(f"{x(at):.2f} {y(value):.2f}" for at, value in through)
        canvas.add("path", d=f"M{steps}", class_="curve dashed", stroke="var(--soft)")
    bars = _along([(x(at), y(value)) for at, value in through])
    for point in points:
        if point.faint:
            at = x(point.x.value), y(point.y.value)
            canvas.open(hint=_hint(point), class_="point")
            canvas.add("path", d=marker_path(point.series, *at, 0.7 * _RADIUS), fill=colour(point.series), opacity=0.6)
            canvas.close()
            continue
        low_x, high_x = _bounds(point.x, x)
        low_y, high_y = _bounds(point.y, y)
        at_x, at_y = x(point.x.value), y(point.y.value)
        canvas.open(hint=_hint(point), class_="point")
        canvas.line(low_x, at_y, high_x, at_y, stroke=colour(point.series), class_="bar")
        canvas.line(at_x, low_y, at_x, high_y, stroke=colour(point.series), class_="bar")
        for arrow in _arrows(point, x, y):
            canvas.add("path", d=arrow, stroke=colour(point.series), class_="bar", fill="none")
        canvas.add("path", d=marker_path(point.series, at_x, at_y, _RADIUS), fill=colour(point.series), class_="dot")
        canvas.close()
        bars += [_Box(low_x, at_y - 2, high_x, at_y + 2), _Box(at_x - 2, high_y, at_x + 2, low_y)]
    level = y(reference[0])
    line = _Box(x.start, level - 2, x.end, level + 2)
    side, anchor = _free_side(points, x, reference[0])
    wide = text_width(reference[1], _FONT)
    note = _Box(side - wide * (anchor == "end"), level - 6 - _FONT, side + wide * (anchor == "start"), level - 2)
    _label(canvas, points, x, y, [*bars, line], note)
    canvas.text(side, level - 6, reference[1], anchor, class_="note")
    return canvas.svg(title)


def _label(canvas: Canvas, points: Sequence[Point], x: Scale, y: Scale, bars: Sequence[_Box], note: _Box) -> None:
    centres = [(x(p.x.value), y(p.y.value)) for p in points]
    dots = [_Box(cx - 9, cy - 9, cx + 9, cy + 9) for cx, cy in centres]
    frame_box = _Box(x.start, y.end, x.end + _RIGHT - 4, y.start)
    placed = [note]
    for point, (cx, cy) in zip(points, centres, strict=True):
        if point.faint:
            continue
        width, height = text_width(point.label, _FONT) + 2 * _GAP, _FONT * 1.15
        best: tuple[float, _Box, float] | None = None
        for distance in (14.0, 22.0, 34.0, 48.0, 64.0, 84.0, 108.0):
            for angle in range(0, 360, 30):
                radians = math.radians(angle)
                ax, ay = cx + distance * math.cos(radians), cy + distance * math.sin(radians)
                # the side of the box that faces the point touches the anchor
                left = ax - width * (0.5 - 0.5 * math.cos(radians))
                top = ay - height * (0.5 - 0.5 * math.sin(radians))
                box = _Box(left, top, left + width, top + height)
                outside = width * height - box.overlap(frame_box)
                cost = distance * 1.0 + 8 * outside
                cost += sum(10 * box.overlap(other) for other in (*dots, *placed))
                cost += sum(2.5 * box.overlap(bar) for bar in bars)
                if best is None or cost < best[0]:
                    best = (cost, box, distance)
        assert best is not None
        _, box, distance = best
        placed.append(box)
        if distance > 22:
            near_x, near_y = min(max(cx, box.left), box.right), min(max(cy, box.top), box.bottom)
            canvas.line(cx, cy, near_x, near_y, class_="leader")
        canvas.text(box.left + _GAP, box.bottom - 3, point.label, fill=colour(point.series), class_="label")


def _along(path: Sequence[tuple[float, float]]) -> list[_Box]:
    """Boxes that a line through these places runs through, close enough that no label fits between them."""
    found = []
    for (left, top), (right, bottom) in pairwise(path):
        steps = max(1, round(math.hypot(right - left, bottom - top) / _STEP))
        for step in range(steps):
            at = left + (right - left) * (step + 0.5) / steps, top + (bottom - top) * (step + 0.5) / steps
            found.append(_Box(at[0] - _STEP / 2, at[1] - _STEP / 2, at[0] + _STEP / 2, at[1] + _STEP / 2))
    return found


def _range(estimates: Sequence[Estimate], more: Sequence[float]) -> tuple[float, float]:
    """Hold every point and every interval; one that is many times as wide as all points lie apart is cut off, which an
    arrow says, so that it presses none of them into a corner."""
    low, high = spread([*(e.value for e in estimates), *more], 0.12, least=0.04)
    bounds = [b for e in estimates for b in (e.low, e.high) if math.isfinite(b)]
    reach = max(_REACH, 3 * (high - low))
    margin = 0.04 * (max([high, *bounds]) - min([low, *bounds]))
    bottom = max(min([low, *(b - margin for b in bounds)]), low - reach)
    top = min(max([high, *(b + margin for b in bounds)]), high + reach)
    return max(bottom, -0.02), top


def _extent(point: Point, estimate: Estimate) -> Estimate:
    return Estimate(estimate.value) if point.faint else estimate


def _bounds(estimate: Estimate, scale: Scale) -> tuple[float, float]:
    low = scale.low if math.isnan(estimate.low) else max(estimate.low, scale.low)
    high = scale.high if math.isnan(estimate.high) else min(estimate.high, scale.high)
    return scale(low), scale(high)


def _arrows(point: Point, x: Scale, y: Scale) -> Iterator[str]:
    """Heads at those ends of the bars that the frame cuts off."""
    at_x, at_y = x(point.x.value), y(point.y.value)
    for scale, estimate, across in ((x, point.x, True), (y, point.y, False)):
        for bound, edge, is_beyond in (
            (estimate.low, scale.low, estimate.low < scale.low),
            (estimate.high, scale.high, estimate.high > scale.high),
        ):
            if not (is_beyond or math.isnan(bound)):
                continue
            tip = scale(edge)
            back = tip + (_HEAD if (tip < scale(estimate.value)) else -_HEAD)
            corners = [(back, -_HEAD / 2), (tip, 0.0), (back, _HEAD / 2)]
            places = [(along, at_y + side) if across else (at_x + side, along) for along, side in corners]
            yield "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)


def _free_side(points: Sequence[Point], x: Scale, at: float) -> tuple[float, str]:
    """Where the reference's label crosses fewest of the points that lie near its line."""
    middle = (x.start + x.end) / 2
    near = [p for p in points if abs(p.y.value - at) < 0.15]
    left = sum(x(p.x.value) < middle for p in near)
    return (x.end - 4, "end") if 2 * left > len(near) else (x.start + 4, "start")


def _hint(point: Point) -> str:
    def say(e: Estimate) -> str:
        low, high = ("unbounded" if math.isnan(b) else f"{100 * b:.1f}" for b in (e.low, e.high))
        return f"{100 * e.value:.1f} % ({low} to {high})"

    return f"{point.label}: across {say(point.x)}, up {say(point.y)}"


def _percent(value: float) -> str:
    return f"{100 * value:.6g}%"
