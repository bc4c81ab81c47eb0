"""A study's pages: the report, and its drawings as files of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from alula.files import write_text
from alula.reports import Document, render
from alula.reports.figures import standalone


def write_pages(directory: Path, document: Document, figures: Mapping[str, str]) -> Path:
    """Write ``report.html`` and ``figures/<name>.svg``; returns the report's path."""
    for name, svg in figures.items():
        write_text(directory / "figures" / f"{name}.svg", standalone(svg))
    return write_text(directory / "report.html", render(document))
