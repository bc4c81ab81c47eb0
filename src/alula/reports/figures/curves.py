"""Loss over steps, on a logarithmic scale: a bold line per series, its repetitions faint behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alula.reports.figures.canvas import Canvas, Scale, apart, text_width
from alula.reports.figures.frame import frame
from alula.reports.figures.markers import marker_path
from alula.reports.palette import colour

WIDTH, HEIGHT = 560, 400
_LEFT, _TOP, _BOTTOM = 52, 44, 54
_FONT = 13.0


@dataclass(frozen=True)
class Curve:
    """One series; ``runs`` are its repetitions as ``(steps, losses)``."""

    label: str
    series: int
    runs: Sequence[tuple[Sequence[float], Sequence[float]]]


def curves(found: Sequence[Curve], *, title: str, y_title: str = "training loss (log scale)") -> str:
    """Return the figure as SVG: faint lines are single runs, bold ones their mean, smoothed over 1/20 of the run."""
    smooth = [[(np.asarray(s, float), _smooth(np.asarray(v, float))) for s, v in curve.runs] for curve in found]
    means = [_mean(runs) for runs in smooth]
    right = 20 + max(text_width(curve.label, _FONT) for curve in found)
    every = np.concatenate([losses for runs in smooth for _, losses in runs])
    every = every[every > 0]
    x = Scale(0, max(steps[-1] for steps, _ in means), _LEFT, WIDTH - right)
    y = Scale(float(every.min()) / 1.12, float(every.max()) * 1.12, HEIGHT - _BOTTOM, _TOP, log=True)
    canvas = Canvas(WIDTH, HEIGHT)
    frame(canvas, x, y, x_title="optimizer step", y_title=y_title, x_format=_plain, y_format=_plain)
    ends = []
    for curve, runs, (steps, losses) in zip(found, smooth, means, strict=True):
        for one_steps, one_losses in runs if len(runs) > 1 else ():
            canvas.add("path", d=_path(x, y, one_steps, one_losses), stroke=colour(curve.series), class_="faint")
        canvas.open(hint=f"{curve.label}: {losses[-1]:.4g} at step {steps[-1]:.0f}")
        canvas.add("path", d=_path(x, y, steps, losses), stroke=colour(curve.series), class_="curve")
        end_x, end_y = x(float(steps[-1])), y(max(float(losses[-1]), y.low))
        canvas.add("path", d=marker_path(curve.series, end_x, end_y, 5.0), fill=colour(curve.series), class_="dot")
        canvas.close()
        ends.append(end_y)
    for curve, end, at in zip(found, ends, apart(ends, _TOP, HEIGHT - _BOTTOM), strict=True):
        canvas.line(x.end + 7, end, x.end + 13, at, class_="leader")
        canvas.text(x.end + 16, at + 4, curve.label, fill=colour(curve.series), class_="label")
    return canvas.svg(title)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average whose window shrinks at both ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _mean(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over runs on the steps of the shortest."""
    steps = min((steps for steps, _ in runs), key=lambda s: s[-1])
    return steps, np.mean([np.interp(steps, s, losses) for s, losses in runs], axis=0)


def _path(x: Scale, y: Scale, steps: np.ndarray, losses: np.ndarray) -> str:
    return "M" + "L".join(f"{x(s):.1f} {y(max(v, y.low)):.1f}" for s, v in zip(steps, losses, strict=True))


def _plain(value: float) -> str:
    return f"{value:g}"
