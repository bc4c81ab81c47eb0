"""A report as data: sections of readings, figures and tables, rendered to one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from alula.evaluation.results import Turn
from alula.reports.figures.markers import marker_svg
from alula.reports.palette import series_css


@dataclass(frozen=True)
class Figure:
    """An inline SVG drawing with its caption."""

    svg: str
    caption: str = ""
    kind: str = field(default="figure", init=False)


@dataclass(frozen=True)
class FigureRow:
    """Figures beside each other where the page is wide enough, under each other where it is not; ``small`` ones stand
    up to five in a row."""

    figures: Sequence[Figure]
    legend: Sequence[Key] = ()
    caption: str = ""
    small: bool = False
    kind: str = field(default="figures", init=False)


@dataclass(frozen=True)
class Key:
    """A legend entry: ``series`` is the index of its colour and marker."""

    label: str
    series: int


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Args:
        text: what it says.
        note: a second, smaller line.
        shade: -1 (lost) .. 0 (unchanged) .. 1 (gained) colours the cell; None leaves it plain.
        hint: shown when pointed at.
        strong: set in bold.
        series: puts the series' marker before the text.
    """

    text: str
    note: str = ""
    shade: float | None = None
    hint: str = ""
    strong: bool = False
    series: int | None = None

    @property
    def style(self) -> str:
        """CSS of the shade."""
        if self.shade is None or abs(self.shade) < 0.005:
            return ""
        name = "--gain" if self.shade > 0 else "--loss"
        return f"background: color-mix(in oklab, var({name}) {min(1.0, abs(self.shade)) * 62:.0f}%, var(--panel))"


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings; the first column names the row. ``heat`` draws it as a compact grid, ``words``
    as text that wraps."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    heat: bool = False
    words: bool = False
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Card:
    """A headline figure: ``value`` large, ``label`` under it, ``text`` small; several per method."""

    title: str
    values: Sequence[tuple[str, str]]
    text: str = ""
    series: int = 0


@dataclass(frozen=True)
class Cards:
    """Headline figures beside each other."""

    cards: Sequence[Card]
    kind: str = field(default="cards", init=False)


@dataclass(frozen=True)
class Exchange:
    """An item as a conversation, with the answers of two models, or of one (``before`` is None).

    ``direction`` is ``"lost"``, ``"gained"`` or ``"wrong"``.
    """

    group: str
    family: str
    direction: str
    prompt: Sequence[Turn]
    gold: str
    before: str | None
    after: str


@dataclass(frozen=True)
class Browser:
    """Exchanges to leaf through, grouped by ``groups`` (name, title, remark); filters work without a server."""

    groups: Sequence[tuple[str, str, str]]
    exchanges: Sequence[Exchange]
    kind: str = field(default="browser", init=False)


@dataclass(frozen=True)
class Answer:
    """What one model, or one way of asking, answered: ``label`` says which."""

    label: str
    text: str
    is_right: bool


@dataclass(frozen=True)
class Example:
    """A conversation with several answers beside it; `gold` is empty where no answer is the only right one."""

    family: str
    prompt: Sequence[Turn]
    gold: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Examples:
    """Conversations beside each other, pictures and all."""

    examples: Sequence[Example]
    caption: str = ""
    kind: str = field(default="examples", init=False)


@dataclass(frozen=True)
class Facts:
    """Keys and values, for what a reader needs to repeat the work; ``code`` is a command line."""

    rows: Sequence[tuple[str, str]]
    code: str = ""
    kind: str = field(default="facts", init=False)


Block = Figure | FigureRow | Table | Cards | Browser | Examples | Facts


@dataclass(frozen=True)
class Section:
    """A part of a report: what it says in plain words first, then what shows it, then where to read on: ``links`` are
    pairs of a text and an address."""

    title: str
    reading: Sequence[str] = ()
    blocks: Sequence[Block] = ()
    links: Sequence[tuple[str, str]] = ()

    @property
    def anchor(self) -> str:
        """The section's fragment identifier."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    head: Sequence[Block] = ()
    footer: str = ""


def render(document: Document) -> str:
    """Return the report as one HTML page without external requests, in light and dark, on screen and on paper."""
    return _environment().get_template("report.html.j2").render(document=document, series=series_css())


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("alula.reports"),
        autoescape=select_autoescape(("html", "j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    environment.globals["marker"] = lambda series: Markup(marker_svg(series))
    return environment
