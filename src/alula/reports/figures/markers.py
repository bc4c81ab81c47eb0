"""A marker per series: where there are more series than shapes, a shape comes again in another color."""

from __future__ import annotations

import math

from alula.reports.palette import colour

MARKERS = ("circle", "square", "diamond", "up", "down", "hexagon", "cross")


def marker_path(series: int, x: float, y: float, r: float) -> str:
    """Return the SVG path data of the series' marker centred on (x, y) with radius ``r``."""
    shape = MARKERS[(series + series // len(MARKERS)) % len(MARKERS)]
    if shape == "circle":
        return f"M{x - r:.2f} {y:.2f}a{r:.2f} {r:.2f} 0 1 0 {2 * r:.2f} 0a{r:.2f} {r:.2f} 0 1 0 {-2 * r:.2f} 0Z"
    if shape == "cross":
        a, b = 0.36 * r, 1.05 * r
        steps = [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    else:
        corners, start, size = {
            "square": (4, 45.0, 1.25),
            "diamond": (4, 0.0, 1.3),
            "up": (3, -90.0, 1.35),
            "down": (3, 90.0, 1.35),
            "hexagon": (6, 0.0, 1.1),
        }[shape]
        angles = [math.radians(start + 360 * k / corners) for k in range(corners)]
        steps = [(size * r * math.cos(angle), size * r * math.sin(angle)) for angle in angles]
    return "M" + "L".join(f"{x + dx:.2f} {y + dy:.2f}" for dx, dy in steps) + "Z"


def marker_svg(series: int, size: int = 14) -> str:
    """Return a small SVG with the series' marker, for legends and tables."""
    path = marker_path(series, size / 2, size / 2, size * 0.34)
    return (
        f'<svg class="marker" width="{size}" height="{size}" viewBox="0 0 {size} {size}" aria-hidden="true">'
        f'<path d="{path}" fill="{colour(series)}"/></svg>'
    )
