"""A report's drawing as a file of its own."""

from __future__ import annotations

import re
from importlib.resources import files

from alula.reports.palette import series_css

_FONT = 'font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif'


def standalone(svg: str) -> str:
    """Return an inline SVG as a whole SVG file, with the page's colours (light and dark) and background inside."""
    style = files("alula.reports").joinpath("templates", "figure.css").read_text(encoding="utf-8")
    size = re.search(r'viewBox="0 0 (\S+) (\S+)"', svg)
    assert size is not None, "every canvas writes its size"
    root = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[1]}" height="{size[2]}" '
    tag, body = svg.replace("<svg ", root, 1).split(">", 1)
    return f"{tag}>\n<style>\n{style}{series_css()}\nsvg {{ {_FONT}; background: var(--page); }}\n</style>{body}\n"
