"""Tables of studies as text: for the terminal and for docs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from alula.reports.document import Cell, Section, Table


@dataclass(frozen=True)
class Grid:
    """A table as text: what it is of, headings, rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def section(self) -> Section:
        """The table for a report."""
        rows = [[Cell(text) for text in row] for row in self.rows]
        return Section(self.title, blocks=[Table(list(self.columns), rows)])

    def drawn(self, caption: str | None = None) -> TerminalTable:
        """The table for the terminal."""
        table = TerminalTable(
            title=self.title,
            caption=caption,
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for place, name in enumerate(self.columns):
            table.add_column(name, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def written(grids: Iterable[Grid], heading: str | None = None) -> str:
    """Tables in Markdown, one below the other.

    Args:
        heading: what stands above each, with ``{}`` for its title; None: nothing does.
    """
    lines: list[str] = []
    for grid in grids:
        lines += [] if heading is None else [heading.format(grid.title), ""]
        lines += [f"| {' | '.join(grid.columns)} |", "|---|" + "---|" * (len(grid.columns) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in grid.rows] + [""]
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")
