"""A study's pages: the report, and its drawings as files of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from alula.files import write_text
from alula.reports import Document, render
from alula.reports.document import Facts, Section
from alula.reports.figures import standalone
from alula.reports.wording import duration
from studies.records import StudyRecord


def write_pages(directory: Path, document: Document, figures: Mapping[str, str]) -> Path:
    """Write ``report.html`` and ``figures/<name>.svg``; returns the report's path."""
    for name, svg in figures.items():
        write_text(directory / "figures" / f"{name}.svg", standalone(svg))
    return write_text(directory / "report.html", render(document))


def to_repeat(record: StudyRecord, seeds: Iterable[int], *facts: tuple[str, str]) -> Section:
    """How a study was made, and the line that makes it again.

    Args:
        seeds: of training.
        facts: names and values of what else should be known.
    """
    rows = [("seeds", ", ".join(map(str, seeds))), *facts, ("whole run", duration(record.seconds))]
    return Section("To repeat this", blocks=[Facts([*rows, *record.environment.items()], record.command)])
