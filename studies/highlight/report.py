"""The study of highlights to look at: a grid of strengths and guidances per question, rivals beside it, a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from alula.reports.document import Cell, Document, Facts, Section, Table
from alula.reports.wording import duration
from alula.stats import Estimate
from studies.examples import examples
from studies.highlight.plan import ARMS, BETAS, GUIDANCES, PAPER, SHOWN, Arm
from studies.highlight.record import HighlightRecord


@dataclass(frozen=True)
class Column:
    """A measure.

    Attributes:
        more_is_better: as against less.
    """

    title: str
    task: str
    measure: str
    more_is_better: bool = True
    is_share: bool = True


COLUMNS = (
    Column("follows", "ambiguous", "right"),
    Column("true, led", "clear", "right"),
    Column("true, misled", "misled", "right"),
    Column("existence", "existence", "right"),
    Column("false yes", "existence", "false yes", False),
    Column("hallucinated", "caption", "hallucinated", False),
    Column("covered", "caption", "covered"),
    Column("well-formed", "caption", "well-formed"),
    Column("nats per token", "caption", "nats", False, is_share=False),
)


def label(arm: Arm) -> str:
    """An arm in words."""
    if arm.method == "none":
        return "no highlight"
    guided = "" if arm.guidance is None else f", guidance {arm.guidance:g}"
    return {
        "shift": f"beta {arm.beta or 1:g}{guided}",
        "hidden": f"hidden{guided}",
        "distorted": f"noised image{guided}",
        "keys": f"keys, gain {arm.beta or 0:g}",
    }[arm.method]


def followed_most(record: HighlightRecord) -> Arm:
    """The strength and guidance that answers follow most often."""
    shifts = [arm for arm in record.arms if arm.method == "shift"]
    return max(shifts, key=lambda arm: record.mean(arm, "ambiguous", "right").value)


def chosen(record: HighlightRecord) -> list[Arm]:
    """The arms of the main table: the paper's setting, each half of it, the best followed, a strong one, and rivals."""
    named = [ARMS[0], Arm("shift", 2.0, 1.0), Arm("shift", 1.0, 1.3), PAPER, followed_most(record)]
    named += [Arm("shift", 20.0, 3.0), *(arm for arm in ARMS if arm.method in ("hidden", "distorted", "keys"))]
    return [arm for arm in dict.fromkeys(named) if arm in record.arms]


PARTS = {"A thing is highlighted": COLUMNS[:3], "The whole picture is highlighted": COLUMNS[3:]}
"""the main table in two, which fit a page"""


def rows(record: HighlightRecord, columns: Sequence[Column] = COLUMNS) -> list[list[str]]:
    """The main table, without arms that none of the columns is of."""

    def cell(arm: Arm, column: Column) -> str:
        if not record.has(arm, column.task):
            return ""
        return _cell(record.mean(arm, column.task, column.measure), column)

    made = [[label(arm), *(cell(arm, column) for column in columns)] for arm in chosen(record)]
    return [row for row in made if any(row[1:])]


def grid(record: HighlightRecord, column: Column) -> list[list[str]]:
    """A measure for every strength and guidance."""

    def one(beta: float, guidance: float) -> str:
        arm = ARMS[0] if (beta, guidance) == (1.0, 1.0) else Arm("shift", beta, guidance)
        found = arm in record.arms
        return _cell(record.mean(arm, column.task, column.measure), column, bounds=False) if found else ""

    return [[f"beta {beta:g}", *(one(beta, guidance) for guidance in GUIDANCES)] for beta in BETAS]


def _cell(found: Estimate, column: Column, *, bounds: bool = True) -> str:
    write: Callable[[float], str] = (lambda x: f"{100 * x:.0f}") if column.is_share else (lambda x: f"{x:.2f}")
    low, high = (max(found.low, 0.0), min(found.high, 1.0) if column.is_share else found.high)
    return f"{write(found.value)} ({write(low)} to {write(high)})" if bounds else write(found.value)


def verdict(record: HighlightRecord) -> list[str]:
    """What the figures say, sentence by sentence."""
    best, found = followed_most(record), []
    said = {PAPER: "the paper's setting", best: f"{label(best)}, which is followed most"}
    for arm in [each for each in said if each in record.arms]:
        parts = []
        for column in COLUMNS:
            gain = record.gain(arm, column.task, column.measure)
            change = f"{100 * gain.value:+.0f}" if column.is_share else f"{gain.value:+.2f}"
            is_sure = gain.low > 0 or gain.high < 0
            parts.append(f"{column.title} {change}{'' if is_sure else ', not told from 0'}")
        found.append(f"Against no highlight, {said[arm]}: {'; '.join(parts)}.")
    return found


def table(record: HighlightRecord) -> TerminalTable:
    """The main table for a terminal."""
    made = TerminalTable("", *(column.title for column in COLUMNS), box=SIMPLE_HEAD)
    for row in rows(record):
        made.add_row(*row)
    return made


def markdown(record: HighlightRecord) -> str:
    """All tables."""
    tables = [_markdown([title, *(each.title for each in part)], rows(record, part)) for title, part in PARTS.items()]
    for column in COLUMNS:
        head = [column.title, *(f"guidance {guidance:g}" for guidance in GUIDANCES)]
        tables.append(_markdown(head, grid(record, column)))
    return "\n\n".join(tables) + "\n"


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures(record: HighlightRecord) -> Mapping[str, str]:
    """None: the grids are tables."""
    return {}


def report(record: HighlightRecord) -> Document:
    """One page."""
    parts = [
        Table([title, *(each.title for each in part)], [[Cell(text) for text in row] for row in rows(record, part)])
        for title, part in PARTS.items()
    ]
    grids = [_heat(record, column) for column in COLUMNS]
    facts = [("seeds", ", ".join(map(str, record.seeds))), ("took", duration(record.seconds))]
    return Document(
        title="Does the answer follow the highlight?",
        lead=verdict(record),
        sections=[
            Section("Methods", READING, parts),
            Section("Strength and guidance", ["The published optimum is looked for, measure by measure."], grids),
            *_to_look_at(record),
            Section("To repeat it", [], [Facts(facts, record.command)]),
        ],
        footer=f"alula, {record.created}. Every figure is made of the result file alone.",
    )


def _to_look_at(record: HighlightRecord) -> list[Section]:
    """Questions beside their framed pictures, where the record has some."""
    if not record.shown:
        return []
    block = examples(record.shown, {arm.name: label(arm) for arm in SHOWN}, _ASKED)
    return [Section("To look at", ["What is highlighted is framed."], [block])]


_ASKED = {
    "ambiguous": "two things that the question could mean",
    "misled": "another thing is highlighted than the question is about",
    "existence": "the whole picture is highlighted",
}


def _heat(record: HighlightRecord, column: Column) -> Table:
    """A grid, each cell coloured by what it is better or worse than no highlight."""
    scale = (1 if column.more_is_better else -1) * (4 if column.is_share else 1)
    body = []
    for beta, texts in zip(BETAS, grid(record, column), strict=True):
        cells = [Cell(texts[0])]
        for guidance, text in zip(GUIDANCES, texts[1:], strict=True):
            arm = ARMS[0] if (beta, guidance) == (1.0, 1.0) else Arm("shift", beta, guidance)
            gain = record.gain(arm, column.task, column.measure).value if arm in record.arms else 0.0
            cells.append(Cell(text, shade=max(-1.0, min(1.0, scale * gain))))
        body.append(cells)
    return Table([column.title, *(f"guidance {guidance:g}" for guidance in GUIDANCES)], body, heat=True)


READING = (
    "Follows: two things of one shape, one of them highlighted; what colour is the shape? True: a question with one "
    "answer, what it is about highlighted (led), or another thing (misled). Existence, false yes, and descriptions: "
    "all of the picture highlighted. Hallucinated and covered are CHAIR's, of things told by colour and shape; nats "
    "are what the words cost the model without a highlight. Per cent, with 95 % intervals over seeds and items.",
)
