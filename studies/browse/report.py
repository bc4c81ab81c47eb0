"""The study of browsing to look at: a verdict, tables and a figure; all from the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from alula.reports.document import Cell, Document, Facts, Figure, FigureRow, Section, Table
from alula.reports.figures import Line, lines
from alula.reports.wording import bounds, duration, percent, points
from alula.stats import Estimate
from studies.browse.plan import ARMS, TASKS
from studies.browse.record import BrowseRecord

_ARMS = {"plain": "without browsing", "browse": "browsing", "staged": "browsing, in two stages"}
_TOLD = {"own": "its own condition", "none": "none (zeros)", "others": "another question's"}
_ASKED = {
    "pictures": "several pictures", "visual": "one picture", "pictures: change": "what changed",
    "pictures: which": "which of four shows it", "pictures: total": "how many in all",
    "pictures: later": "what the words behind them ask",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """A table as text: what it is of, headings, rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def grids(record: BrowseRecord) -> list[Grid]:
    """Every table."""
    groups = _groups(record)
    right, gained = [], []
    for arm in ARMS:
        right.append([_ARMS[arm], *(_share(record.share(arm, "own", group)) for group in groups)])
        if arm != "plain":
            gained.append([_ARMS[arm], *(_points(record.gain(arm, "own", group)) for group in groups)])
    told = [
        [_ARMS[arm], _TOLD[name], *(_points(record.gain(arm, name, group, over=(arm, "own"))) for group in groups)]
        for arm in ARMS[1:]
        for name in _TOLD
        if name != "own"
    ]
    columns = [_ASKED[group] for group in groups]
    return [
        Grid("Right answers", ["trained", *columns], right),
        Grid("Against the same training without browsing, question by question", ["trained", *columns], gained),
        Grid("What another condition at test costs", ["trained", "told", *columns], told),
    ]


def table(record: BrowseRecord) -> TerminalTable:
    """Right answers, for the terminal."""
    grid = grids(record)[0]
    drawn = TerminalTable(title=grid.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(grid.columns):
        drawn.add_column(name, justify="right" if place else "left")
    for row in grid.rows:
        drawn.add_row(*row)
    return drawn


def markdown(record: BrowseRecord) -> str:
    """All tables for docs."""
    written = []
    for grid in grids(record):
        written += [
            f"**{grid.title}**",
            "",
            f"| {' | '.join(grid.columns)} |",
            "|---|" + "---|" * (len(grid.columns) - 1),
        ]
        written += [f"| {' | '.join(row)} |" for row in grid.rows] + [""]
    return "\n".join(written).replace("\N{NO-BREAK SPACE}", " ")


def verdict(record: BrowseRecord) -> list[str]:
    """What the study found, question by question."""
    return [_helps(record), _told(record), _keeps(record)]


def _helps(record: BrowseRecord) -> str:
    said = []
    for arm in ARMS[1:]:
        found = record.gain(arm, "own", "pictures")
        said.append(f"{_ARMS[arm]} {_sign(found)} ({_points(found)})")
    plain = _share(record.share("plain", "own", "pictures"))
    return (
        f"Does it help where one picture cannot answer? The same training without it answers {plain} right; "
        f"{'; '.join(said)}."
    )


def _told(record: BrowseRecord) -> str:
    said = []
    for arm in ARMS[1:]:
        each = [
            f"{_TOLD[name]} {_points(record.gain(arm, name, 'pictures', over=(arm, 'own')))}"
            for name in ("none", "others")
        ]
        said.append(f"{_ARMS[arm]}: {' and '.join(each)}")
    return f"Does the answer depend on what the connector is told? Told otherwise at test, {'; '.join(said)}."


def _keeps(record: BrowseRecord) -> str:
    said = [f"{_ARMS[arm]} {_points(record.gain(arm, 'own', 'visual'))}" for arm in ARMS[1:]]
    return f"What of questions about one picture? Against the same training without it, {'; '.join(said)}."


def _sign(found: Estimate) -> str:
    if found.low > 0:
        return "answers more"
    return "answers fewer" if found.high < 0 else "shows no difference"


def figures(record: BrowseRecord) -> dict[str, str]:
    """Inline SVG by name."""
    groups = [group for group in _groups(record) if ":" in group]
    drawn = [
        Line(_ARMS[arm], series, [record.share(arm, "own", group).value for group in groups])
        for series, arm in enumerate(ARMS)
    ]
    return {
        "families": lines(
            list(range(1, len(groups) + 1)),
            drawn,
            title="right answers by kind of question",
            x_title=", ".join(f"{place}: {_ASKED[group]}" for place, group in enumerate(groups, 1)),
            y_title="right",
            y_format=_whole,
        )
    }


def report(record: BrowseRecord) -> Document:
    """The report as data."""
    drawn = [Figure(svg, "Right answers to questions about several pictures.") for svg in figures(record).values()]
    sections = [Section("Kinds of questions", blocks=[FigureRow(drawn)])]
    for grid in grids(record):
        rows = [[Cell(text) for text in row] for row in grid.rows]
        sections.append(Section(grid.title, blocks=[Table(list(grid.columns), rows)]))
    facts = [
        ("seeds", ", ".join(map(str, record.seeds))),
        ("training", f"{record.settings['training']} steps of every arm"),
        ("questions", f"{record.settings['items']} about several pictures, a quarter as many about one"),
        ("whole run", duration(record.seconds)),
        *record.environment.items(),
    ]
    sections.append(Section("To repeat this", blocks=[Facts(facts, record.command)]))
    return Document(
        title="Does reading everything once help to look?",
        lead=verdict(record),
        sections=sections,
        footer=f"alula, {record.created}. Every figure is drawn from the result file alone.",
    )


def _groups(record: BrowseRecord) -> list[str]:
    return [*TASKS, *(family for family in record.families if family.startswith("pictures:"))]


def _whole(share: float) -> str:
    return percent(share, 0)


def _share(estimate: Estimate) -> str:
    return f"{percent(estimate.value)} ({bounds(estimate)})"


def _points(estimate: Estimate) -> str:
    return f"{points(estimate)} points ({bounds(estimate)})"
