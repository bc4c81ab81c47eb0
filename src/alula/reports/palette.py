"""Colours that stay apart for colour-blind eyes and reach a contrast of 3:1 on the page, light or dark.

Hues follow Okabe and Ito's set; every series also has a marker of its own, so nothing is shown by color alone.
"""

from __future__ import annotations

SERIES_LIGHT = ("#0068a8", "#c44e00", "#007a5a", "#8146b8", "#8d6300", "#b0306a", "#4d5964")
SERIES_DARK = ("#62b6ee", "#ff9152", "#3ccb9f", "#c39bf0", "#e5b93f", "#f27fb0", "#aab5c0")
NEUTRAL = len(SERIES_LIGHT) - 1
"""the grey series, for what belongs to no method"""


def colour(series: int) -> str:
    """Return the CSS value of a series' colour."""
    return f"var(--s{series % len(SERIES_LIGHT)})"


def series_css() -> str:
    """Return the CSS that defines the series' colours, light and dark."""
    light, dark = (
        " ".join(f"--s{index}: {value};" for index, value in enumerate(values))
        for values in (SERIES_LIGHT, SERIES_DARK)
    )
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
