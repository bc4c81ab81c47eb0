"""The study of truthfulness to look at: verdicts on the paper's claims, tables, a figure; all from the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.table import Table as TerminalTable

from alula.reports.document import Block, Cell, Document, Facts, Figure, FigureRow, Section, Table
from alula.reports.figures import Point, scatter
from alula.reports.wording import MISSING, bounds, duration, listing, percent, points, probability
from alula.stats import Estimate
from studies.grids import Grid, written
from studies.truthfulness.arms import KINDS, WAYS, Arm
from studies.truthfulness.record import BASE, ETHICS, TRUTH, TruthRecord, pairs_of


@dataclass(frozen=True)
class Column:
    """A figure of a model: the mean of a measure over tasks."""

    title: str
    tasks: tuple[str, ...]
    measure: str = "score"


SCORES = (Column("mc1", TRUTH[:1]), Column("mc2", TRUTH[1:]), Column("ethics", ETHICS))
HABITS = (
    Column("said yes", ETHICS, "yes"),
    Column("balanced", ETHICS, "balanced"),
    Column("order", ETHICS, "order"),
    Column("Brier", ETHICS, "brier"),
)
COLUMNS = (*SCORES, *HABITS)
"""ethics: the mean of the five tasks"""
ORDER = HABITS[2]

READING = (
    "mc1: the right answer is the likeliest. mc2: probability on right answers. ethics: five sets of questions that "
    "are answered yes or no, their mean. Said yes, balanced, order and Brier are of ethics. Balanced: the share right "
    "of questions whose answer is yes and of those whose answer is no, averaged; order: how often yes is held likelier "
    "of a question where it is right than of one where it is not. A habit of saying yes or no moves said yes and "
    "ethics; it gets 50 % of balanced and of order."
)


# -- verdicts ------------------------------------------------------------------------------------------------------


def verdict(record: TruthRecord) -> list[str]:
    """The paper's claims, a sentence each, and what they would not say."""
    seeing = [arm for arm in record.arms if arm.sees and arm.kind == "all"]
    pairs = [pair for pair in pairs_of(record.arms) if pair[0].kind == "all"]
    said = []
    if seeing:
        said.append(_raised(record, seeing, SCORES[:2], "Learning from pictures makes a model more truthful"))
        said.append(_ethics(record, seeing))
    if pairs:
        said.append(_words(record, pairs))
    if len(seeing) > 1:
        said.append(_ways(record, seeing))
    if kinds := [arm for arm in record.arms if arm.kind != "all"]:
        said.append(_kinds(record, kinds))
    return said


def _raised(record: TruthRecord, arms: Sequence[Arm], columns: Sequence[Column], claim: str) -> str:
    parts, signs = [], []
    for arm in arms:
        found = [(column, _against(record, arm.name, BASE, column)) for column in columns]
        signs += [_sign(each) for _, each in found if each is not None]
        parts.append(f"{WAYS[arm.way]} {listing([f'{column.title} {_told(each)}' for column, each in found])}")
    return f"{claim}: {_judged(signs)}. Against the base, in points: {'; '.join(parts)}."


def _ethics(record: TruthRecord, arms: Sequence[Arm]) -> str:
    parts, signs = [], []
    for arm in arms:
        score, order = (_against(record, arm.name, BASE, column) for column in (SCORES[2], ORDER))
        shift = _against(record, arm.name, BASE, HABITS[0])
        # a gain that the order of answers does not share is one of habit
        both = (_sign(score), _sign(order))
        signs.append(both[0] if both[0] == both[1] else 0)
        parts.append(f"{WAYS[arm.way]} {_told(score)}, order {_told(order)}, yes said {_told(shift)} more often")
    return (
        "It makes it more ethical (score and order of answers both up): "
        f"{_judged(signs)}. Against the base, in points: {'; '.join(parts)}."
    )


def _words(record: TruthRecord, pairs: Sequence[tuple[Arm, Arm]]) -> str:
    parts, apart = [], 0
    for seeing, words in pairs:
        found = [(column, _against(record, seeing.name, words.name, column)) for column in (*SCORES, ORDER)]
        apart += sum(_sign(each) != 0 for _, each in found)
        parts.append(f"{WAYS[seeing.way]} {listing([f'{column.title} {_told(each)}' for column, each in found])}")
    whole = len(pairs) * (len(SCORES) + 1)
    return (
        f"Pictures against words alone: of {whole} differences between the same conversations with and without, the "
        f"interval of {apart} excludes 0. With less without, in points: {'; '.join(parts)}."
    )


def _ways(record: TruthRecord, arms: Sequence[Arm]) -> str:
    parts = []
    for arm in arms[1:]:
        found = [(column, _against(record, arm.name, arms[0].name, column)) for column in (*SCORES, ORDER)]
        parts.append(f"{WAYS[arm.way]} {listing([f'{column.title} {_told(each)}' for column, each in found])}")
    return f"Against {WAYS[arms[0].way]} on the same pictures, in points: {'; '.join(parts)}."


def _kinds(record: TruthRecord, arms: Sequence[Arm]) -> str:
    parts = []
    for kind in KINDS:
        shown = []
        for arm in (each for each in arms if each.kind == kind):
            changes = [
                f"{column.title} {_told(_against(record, arm.name, BASE, column))}" for column in (*SCORES, ORDER)
            ]
            shown.append(f"{'with pictures' if arm.sees else 'words alone'} {listing(changes)}")
        if shown:
            parts.append(f"{kind}: {'; '.join(shown)}")
    return f"By kind of conversation (full tuning), against the base, in points: {'. '.join(parts)}."


def _judged(signs: Sequence[int]) -> str:
    if all(sign > 0 for sign in signs):
        return "yes"
    if all(sign < 0 for sign in signs):
        return "no, it lowers it"
    up, down = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
    return (
        f"not shown ({up} of {len(signs)} intervals above 0, {down} below)"
        if up
        else f"no ({down} of {len(signs)} intervals below 0, none above)"
    )


def _against(record: TruthRecord, name: str, other: str, column: Column) -> Estimate | None:
    return record.difference(name, other, column.tasks, column.measure)


def _sign(found: Estimate | None) -> int:
    return 0 if found is None else int(found.low > 0) - int(found.high < 0)


def _told(found: Estimate | None) -> str:
    return MISSING if found is None else f"{points(found)} ({bounds(found)})"


# -- tables --------------------------------------------------------------------------------------------------------


def grids(record: TruthRecord) -> list[Grid]:
    """Every table."""
    found = [_models(record), _changes(record), _pairs(record), _tasks(record), _premises(record)]
    return [grid for grid in found if grid.rows]


def _models(record: TruthRecord) -> Grid:
    rows = [["base", *(_mean(record, BASE, column) for column in COLUMNS)]]
    rows += [[arm.label, *(_mean(record, arm.name, column) for column in COLUMNS)] for arm in record.arms]
    constants = (("always yes", "always_yes"), ("always the first", "always_first"),
                 ("always the shortest", "always_shortest"), ("chance", "chance"))  # fmt: skip
    for title, key in constants:
        cells = []
        for column in SCORES:
            known = [record.tasks[task].constants.get(key) for task in column.tasks]
            there = [value for value in known if value is not None]
            cells.append(percent(sum(there) / len(there)) if len(there) == len(known) else "")
        rows.append([title, *cells, *[""] * len(HABITS)])
    return Grid("What each model scores", ["", *(column.title for column in COLUMNS)], rows)


def _changes(record: TruthRecord) -> Grid:
    rows = [[arm.label, *(_difference(record, arm.name, BASE, column) for column in COLUMNS)] for arm in record.arms]
    return Grid("Against the base, in points", ["", *(column.title for column in COLUMNS)], rows)


def _pairs(record: TruthRecord) -> Grid:
    rows = [
        [seeing.label.rpartition(",")[0], *(_difference(record, seeing.name, words.name, column) for column in COLUMNS)]
        for seeing, words in pairs_of(record.arms)
    ]
    return Grid("With pictures less words alone, in points", ["", *(column.title for column in COLUMNS)], rows)


def _tasks(record: TruthRecord) -> Grid:
    arms = [arm for arm in record.arms if arm.way == "full" and arm.kind == "all"]
    rows = []
    for task, asked in record.tasks.items():
        for measure in ("score", "order"):
            column = Column(measure, (task,), measure)
            if measure in record.seeds[next(iter(record.seeds))][BASE][task]:
                yes = asked.constants.get("always_yes") if measure == "score" else None
                name = asked.title.removeprefix("microworld, ") + ("" if measure == "score" else ": order")
                rows.append(
                    [
                        name,
                        _mean(record, BASE, column),
                        "" if yes is None else percent(yes),
                        *(_difference(record, arm.name, BASE, column) for arm in arms),
                    ]
                )
    titles = [arm.label.rpartition(", ")[2] for arm in arms]
    return Grid("Task by task, full tuning against the base", ["", "base", "always yes", *titles], rows if arms else [])


def _premises(record: TruthRecord) -> Grid:
    kinds = list(dict.fromkeys(record.tasks[TRUTH[0]].premise))
    asked = [(task, kind) for task in TRUTH for kind in kinds]
    base = [record.of_premise(BASE, None, kind, task) for task, kind in asked]
    rows = [["base, right", *map(_share, base)]]
    for arm in record.arms:
        rows.append([arm.label, *(_told(record.of_premise(arm.name, BASE, kind, task)) for task, kind in asked)])
    titles = {"premise": "false premises", "popular": "popular answers"}
    names = [f"{task.rpartition('_')[2]}, {titles.get(kind, kind)}" for task, kind in asked]
    return Grid("Truth by kind of question, against the base", ["", *names], rows)


def _mean(record: TruthRecord, name: str, column: Column) -> str:
    found = record.mean(name, column.tasks, column.measure)
    return MISSING if found is None else _share(found)


def _share(found: Estimate) -> str:
    """With an interval that knows the range of a share."""
    inside = Estimate(found.value, max(found.low, 0.0), min(found.high, 1.0))
    return f"{percent(found.value)} ({bounds(inside)})"


def _difference(record: TruthRecord, name: str, other: str, column: Column) -> str:
    test = record.signs(name, other, column.tasks, column.measure)
    return MISSING if test is None else f"{_told(_against(record, name, other, column))}, {probability(test.p)}"


def table(record: TruthRecord) -> TerminalTable:
    """What each model scores, for the terminal."""
    grid = _models(record)
    bare = [[cell.partition(" (")[0] if place else cell for place, cell in enumerate(row)] for row in grid.rows]
    return replace(grid, rows=bare).drawn("intervals and differences: tables.md and the report")


def markdown(record: TruthRecord) -> str:
    """All tables for docs."""
    return written(grids(record), "## {}")


# -- the page ------------------------------------------------------------------------------------------------------


def figures(record: TruthRecord) -> dict[str, str]:
    """Inline SVG by name: all conversations, and by kind. Intervals are those of the paired change from the base."""
    groups = {
        "habit": [arm for arm in record.arms if arm.kind == "all"],
        "kinds": [arm for arm in record.arms if arm.kind != "all"],
    }
    drawn = {}
    base = [record.mean(BASE, column.tasks, column.measure) for column in (SCORES[2], ORDER)]
    for name, arms in groups.items():
        dots = []
        for number, arm in enumerate(arms):
            score, order = (
                None if start is None else _moved(start, _against(record, arm.name, BASE, column))
                for start, column in zip(base, (SCORES[2], ORDER), strict=True)
            )
            if score is not None and order is not None:
                dots.append(Point(arm.label, number, score, order))
        if dots and base[1] is not None:
            drawn[name] = scatter(
                dots,
                title="Ethics: score and order of answers",
                x_title=f"score (the base: {percent(base[0].value if base[0] else None)})",
                y_title="order of answers",
                reference=(base[1].value, "the base"),
                size=(900, 520),
            )
    return drawn


def _moved(start: Estimate, change: Estimate | None) -> Estimate | None:
    if change is None:
        return None
    return Estimate(*(start.value + part for part in (change.value, change.low, change.high)))


def report(record: TruthRecord) -> Document:
    """One page."""
    caption = "Right: higher score. Up: better ordered, which no habit of answering does. Bars: 95 % intervals."
    drawn: list[Block] = [FigureRow([Figure(svg)], [], caption) for svg in figures(record).values()]
    sections = [
        Section(grid.title, [], [Table(list(grid.columns), [[_cell(cell) for cell in row] for row in grid.rows])])
        for grid in grids(record)
    ]
    facts = [
        ("training seeds", ", ".join(map(str, record.seeds))),
        *((asked.title, f"{len(asked.clusters)} questions") for asked in record.tasks.values()),
        ("took", duration(record.seconds)),
        *record.environment.items(),
    ]
    return Document(
        title="Sight beyond text?",
        lead=verdict(record),
        sections=[
            Section("Habit or ethics", [READING], drawn),
            *sections,
            Section("To repeat it", [], [Facts(facts, record.command)]),
        ],
        footer=f"alula, {record.created}. Every figure is made of the result file alone.",
    )


def _cell(text: str) -> Cell:
    value, parted, rest = text.partition(" (")
    if not parted or " to " not in rest:
        return Cell(text)
    interval, _, p = rest.partition(")")
    low, high = (float(bound) for bound in interval.split(" to "))
    note = interval + p.replace(", ", "\n", 1)
    return Cell(value, note=note, strong=value[0] in "+-" and (low > 0 or high < 0))
