"""Figures of audit sections: lines over layers and states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alula.auditing.finding import interval
from alula.reports.document import Block, Figure, FigureRow
from alula.reports.figures import Line, lines
from alula.stats import Curve, Estimate

_RARE = {"points": 5, "depth": 6, "normals": 7, "motion": 8, "response": 9}
SERIES = {"image": 1, "text": 0, "video": 2, "audio": 3, "before": 0, "after": 2, "between": 3, "system": 5, **_RARE}
"""colors and markers: words are blue and images orange in every figure"""


def line(label: str, series: int, curve: Curve, *, dashed: bool = False) -> Line:
    return Line(label, series, [e.value for e in curve], [(e.low, e.high) for e in curve], dashed)


def over_depth(
    found: Sequence[Line], caption: str = "", *, xs: Sequence[float] | None = None, **options: Any
) -> list[Figure]:
    """Lines over layers or states, which are numbered from 0 unless named; no figure where nothing is defined."""
    defined = [line for line in found if any(math.isfinite(value) for value in line.values)]
    if not defined:
        return []
    return [Figure(lines(range(len(defined[0].values)) if xs is None else xs, defined, **options), caption)]


def drawn_row(figures: Sequence[Figure], caption: str = "") -> list[Block]:
    return [FigureRow(figures, caption=caption)] if figures else []


def flat(label: str, series: int, values: Sequence[float], *, dashed: bool = False) -> Line:
    return Line(label, series, list(values), dashed=dashed)


def varies(curve: Curve) -> bool:
    return any(math.isfinite(e.value) and e.value > 0 for e in curve)


def or_undefined(estimate: Estimate | None) -> str:
    return "undefined" if estimate is None else interval(estimate)
