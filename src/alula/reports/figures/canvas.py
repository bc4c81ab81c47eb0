"""The little SVG the figures need: a canvas that collects shapes, and scales with readable ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

CHARACTER = 0.55
"""mean width of a character in units of the font size, a little generous so that labels never touch"""
_LINE = 16.0
"""distance of two labels under each other"""


@dataclass(frozen=True)
class Scale:
    """A map from values to pixels, linear or logarithmic (base 10); ``whole`` puts ticks at whole numbers only."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 6) -> list[float]:
        """Return round values inside the scale, roughly ``about`` of them."""
        if not self.log:
            step = nice_step((self.high - self.low) / about)
            step = max(1, math.ceil(step)) if self.whole else step
            first = math.ceil(self.low / step - 1e-9)
            last = math.floor(self.high / step + 1e-9)
            return [round(k * step, 10) for k in range(first, last + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            found = [d * 10.0**k for k in decades for d in digits if self.low <= d * 10.0**k <= self.high]
            if len(found) >= min(about, 4):
                break
        return found


def nice_step(raw: float) -> float:
    """Return the smallest of 1, 2, 2.5, 5 times a power of ten that is at least ``raw``."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * (1 - 1e-9))


def spread(values: Iterable[float], margin: float = 0.06, least: float = 0.0) -> tuple[float, float]:
    """Return a range that holds ``values`` with a margin, at least ``least`` wide."""
    found = list(values)
    low, high = min(found), max(found)
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
    pad = (high - low) * margin or 0.5
    return low - pad, high + pad


class Canvas:
    """Collects SVG elements; attribute names with underscores become hyphens."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def add(self, tag: str, text: str | None = None, **attributes: object) -> None:
        """Append one element; ``text`` is escaped."""
        written = "".join(
            f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items()
        )
        self.parts.append(f"<{tag}{written}/>" if text is None else f"<{tag}{written}>{escape(text)}</{tag}>")

    def open(self, tag: str = "g", hint: str = "", **attributes: object) -> None:
        """Open a group; ``hint`` is shown when it is pointed at."""
        written = "".join(
            f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items()
        )
        self.parts.append(f"<{tag}{written}>" + (f"<title>{escape(hint)}</title>" if hint else ""))

    def close(self, tag: str = "g") -> None:
        """Close a group."""
        self.parts.append(f"</{tag}>")

    def line(self, x1: float, y1: float, x2: float, y2: float, **attributes: str) -> None:
        """Append a straight line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)

    def text(self, x: float, y: float, text: str, anchor: str = "start", **attributes: str) -> None:
        """Append a text; ``anchor`` is start, middle or end."""
        self.add("text", text, x=x, y=y, text_anchor=anchor, **attributes)

    def svg(self, name: str) -> str:
        """Return the drawing; ``name`` is what a screen reader says of it."""
        body = "\n".join(self.parts)
        return (
            f'<svg role="img" aria-label="{escape(name, quote=True)}" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'style="max-width:{self.width * 1.2:g}px">\n{body}\n</svg>'
        )


def text_width(text: str, size: float) -> float:
    """Return about how wide ``text`` is when set in ``size`` pixels."""
    return len(text) * size * CHARACTER


def apart(positions: Sequence[float], top: float, bottom: float) -> list[float]:
    """Push label positions at least a line apart, keeping their order and staying inside."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [0.0] * len(positions)
    last = top - _LINE
    for index in order:
        last = placed[index] = max(positions[index], last + _LINE)
    over = last - bottom
    if over > 0:
        last = bottom + _LINE
        for index in reversed(order):
            last = placed[index] = min(placed[index], last - _LINE)
    return placed


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(str(value), quote=True)
