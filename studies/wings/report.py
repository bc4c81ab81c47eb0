"""The ablation to look at: one table, scatter plots with intervals, question by question; all from the record."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as TerminalTable

from alula.evaluation.results import Estimate
from alula.reports import readings
from alula.reports.document import Block, Cell, Document, Facts, Figure, FigureRow, Section, Table
from alula.reports.figures import Point, scatter
from alula.reports.outcome import Outcome
from alula.reports.summary import Method, Summary
from alula.reports.wording import MISSING, bounds, count, duration, listing, percent, points, rates
from studies.wings.arms import ARMS, GROUPS
from studies.wings.contrasts import Contrast, contrasts

_REFERENCES = {"parts": ("lora", "wings"), "rank": ("lora", "wings"), "rate": ("full", "wings")}
"""arms of another group that a group's figure shows as well"""
_COLUMNS = (
    ("text_bare", "text bare: kept"),
    ("text_after_image", "text after an image: kept"),
    ("visual", "visual skill: right"),
)
_PLAIN = {"text_bare": "bare text", "text_after_image": "text after an image", "visual": "visual skill"}
_KEPT = ("text_bare", "text_after_image")


def verdict(outcome: Outcome) -> list[str]:
    """What the ablation found, a sentence per question."""
    return [f"{contrast.question.asks}: {_said(contrast)}." for contrast in contrasts(outcome)]


def table(outcome: Outcome) -> TerminalTable:
    """The arms as a table for the terminal."""
    summary = Summary(outcome)
    drawn = TerminalTable(
        title=escape(outcome.title),
        caption=f"kept: share of the base's accuracy; {_trainings(outcome)}; 95 % intervals",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    drawn.add_column("")
    for _, title in _COLUMNS:
        drawn.add_column(title, justify="right")
    for method in summary.methods:
        found = _estimates(summary, method)
        drawn.add_row(
            escape(method.label), *(f"{percent(e.value)}\n[dim]{bounds(e)}[/dim]" if e else MISSING for e in found)
        )
    return drawn


def markdown(outcome: Outcome) -> str:
    """Two tables for docs: the arms, and the questions."""
    summary = Summary(outcome)
    lines = [
        f"<!-- {outcome.command}; {outcome.created} -->",
        f"| | {' | '.join(title for _, title in _COLUMNS)} | trained parameters |",
        "|---|" + "---|" * (len(_COLUMNS) + 1),
    ]
    for method in summary.methods:
        cells = [f"{percent(e.value)} ({bounds(e)})" if e else MISSING for e in _estimates(summary, method)]
        lines.append(f"| {method.label} | {' | '.join(cells)} | {_size(method)} |")
    lines += ["", "| accuracy, in points | text bare | text after an image | visual skill |", "|---|---|---|---|"]
    for contrast in contrasts(outcome):
        cells = [_difference(contrast.differences[task]) for task, _ in _COLUMNS]
        lines.append(f"| {contrast.question.asks} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ") + "\n"


def figures(outcome: Outcome) -> dict[str, str]:
    """Inline SVG by name."""
    summary = Summary(outcome)
    return {
        f"{group}-{task.replace('_', '-')}": svg
        for group in GROUPS
        for task in _KEPT
        if (svg := _scatter(summary, group, task)) is not None
    }


def report(outcome: Outcome) -> Document:
    """The report as data."""
    summary, drawn = Summary(outcome), figures(outcome)
    sections = []
    for group, title in GROUPS.items():
        blocks: list[Block] = []
        found = [Figure(svg) for name, svg in drawn.items() if name.startswith(f"{group}-")]
        if found:
            blocks.append(FigureRow(found, caption="Up: more text kept. Right: sees better. Bars: 95 % intervals."))
        members = [method for method in summary.methods if _group(method) == group]
        if members:
            sections.append(Section(title, [], [*blocks, _arms(summary, members)]))
    reading = [
        "Accuracy of the first minus that of the second, in percentage points, paired by item and training seed. "
        "Intervals carry seeds and items; they are not corrected for the number of questions."
    ]
    sections = [Section("Question by question", reading, [_questions(outcome)]), *sections, _repeat(summary)]
    return Document(
        title=outcome.title,
        lead=[*readings.lead(summary), _tally(outcome)],
        sections=sections,
        footer=f"alula, {outcome.created}. Every figure is drawn from the result file alone.",
    )


def _group(method: Method) -> str:
    return next(arm.group for arm in ARMS if arm.name == method.name)


def _scatter(summary: Summary, group: str, task: str) -> str | None:
    shown = [m for m in summary.methods if _group(m) == group or m.name in _REFERENCES.get(group, ())]
    if not any(_group(method) == group for method in shown):
        return None
    dots = []
    for number, method in enumerate(shown):
        seen, kept = summary.overall(method, "visual").tuned, summary.overall(method, task).retention
        if kept is not None:
            repeats = tuple(zip(seen.per_seed, kept.per_seed, strict=True)) if len(kept.per_seed) > 1 else ()
            dots.append(Point(method.label, number, seen.mean, kept.mean, repeats))
    if not dots:
        return None
    title = f"{summary.title(task)}: share of the base's accuracy kept"
    reference = (1.0, "the untuned base")
    return scatter(dots, title=title, x_title="visual questions answered right", y_title=title, reference=reference)


def _estimates(summary: Summary, method: Method) -> list[Estimate | None]:
    found: list[Estimate | None] = []
    for task, _ in _COLUMNS:
        part = summary.overall(method, task)
        spread = part.retention if task in _KEPT else part.tuned
        found.append(None if spread is None else spread.mean)
    return found


def _arms(summary: Summary, members: list[Method]) -> Table:
    base = [Cell(summary.outcome.base.label, note="accuracy before tuning")]
    base += [Cell(percent(summary.base_accuracy(task))) for task, _ in _COLUMNS]
    rows = [[*base, Cell(""), Cell("")]]
    for method in members:
        cells = [Cell(percent(e.value), note=bounds(e)) if e else Cell(MISSING) for e in _estimates(summary, method)]
        name = Cell(method.label, note=method.outcome.description)
        rows.append([name, *cells, Cell(_size(method), note=_time(method)), Cell(rates(method.outcome.learning_rates))])
    return Table(["", *(title for _, title in _COLUMNS), "trained parameters, time", "learning rate"], rows)


def _questions(outcome: Outcome) -> Table:
    rows = []
    for contrast in contrasts(outcome):
        cells = []
        for task, _ in _COLUMNS:
            found = contrast.differences[task]
            cells.append(Cell(points(found), note=bounds(found), strong=_shown(found), shade=found.value / 0.25))
        rows.append([Cell(contrast.question.asks), *cells])
    columns = ["", *(outcome.tasks[task] for task, _ in _COLUMNS)]
    return Table(columns, rows, "Bold: the interval excludes 0.")


def _said(contrast: Contrast) -> str:
    clear = [task for task in _PLAIN if _shown(contrast.differences[task])]
    other = [name for task, name in _PLAIN.items() if task not in clear]
    parts = [f"{_PLAIN[task]} {_difference(contrast.differences[task])} points" for task in clear]
    if other:
        parts.append(f"no difference shown in {listing(other)}")
    return "; ".join(parts)


def _tally(outcome: Outcome) -> str:
    found = contrasts(outcome)
    parts = [f"{sum(_shown(c.differences[task]) for c in found)} in {name}" for task, name in _PLAIN.items()]
    return f"Of {len(found)} comparisons of one arm with another, an interval excludes no difference: {listing(parts)}."


def _shown(found: Estimate) -> bool:
    return found.low > 0 or found.high < 0


def _difference(found: Estimate) -> str:
    return f"{points(found)} ({bounds(found)})"


def _size(method: Method) -> str:
    sizes = [seed.trainable_parameters for seed in method.outcome.seeds.values() if seed.trainable_parameters]
    return count(sizes[0]) if sizes else MISSING


def _time(method: Method) -> str:
    times = [seed.seconds for seed in method.outcome.seeds.values() if seed.seconds]
    return duration(sum(times) / len(times)) if times else ""


def _trainings(outcome: Outcome) -> str:
    seeds = len(outcome.seeds)
    return f"{seeds} trainings per arm" if seeds > 1 else "one training per arm"


def _repeat(summary: Summary) -> Section:
    outcome = summary.outcome
    asked = [
        (f"items, {outcome.tasks[task]}", str(summary.overall(summary.methods[0], task).n)) for task in outcome.tasks
    ]
    rows = [("whole study", duration(outcome.seconds)), *asked, *outcome.environment.items(), ("made", outcome.created)]
    return Section("To repeat this", [], [Facts(rows, outcome.command)])
