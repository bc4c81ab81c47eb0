"""An ablation to look at: one table, scatter plots with intervals, question by question; all from the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as TerminalTable

from alula.evaluation import SeedsComparison
from alula.evaluation.results import Estimate
from alula.reports import readings
from alula.reports.document import Block, Cell, Document, Facts, Figure, FigureRow, Section, Table
from alula.reports.figures import Point, scatter
from alula.reports.figures.scatter import SIZE
from alula.reports.outcome import Outcome
from alula.reports.summary import Method, Summary
from alula.reports.wording import MISSING, STARRED, bounds, count, duration, listing, percent, points, rates
from alula.stats import Side
from studies.arms.ablation import Ablation, Column
from studies.arms.contrasts import Contrast, contrasts

More = Mapping[str, Mapping[str, str]]
"""Further columns: title -> name of an arm -> cell."""


def verdict(ablation: Ablation, outcome: Outcome) -> list[str]:
    """What the ablation found, a sentence per question."""
    return [f"{contrast.question.asks}: {_said(contrast)}." for contrast in contrasts(ablation, outcome)]


def table(ablation: Ablation, outcome: Outcome, more: More | None = None) -> TerminalTable:
    """The arms as a table for the terminal, with ``more`` columns."""
    summary = Summary(outcome)
    drawn = TerminalTable(
        title=escape(outcome.title),
        caption=f"kept: share of the base's accuracy; {_trainings(outcome)}; 95 % intervals\n{STARRED}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    drawn.add_column("")
    for title in (*(column.title for column in ablation.columns), *(more or {})):
        drawn.add_column(title, justify="right")
    for method in summary.methods:
        found = [_estimate(summary, method, column) for column in ablation.columns]
        cells = [f"{percent(e.value)}\n[dim]{bounds(e, exact)}[/dim]" if e else MISSING for e, exact in found]
        drawn.add_row(escape(method.label), *cells, *_more(more, method))
    return drawn


def markdown(ablation: Ablation, outcome: Outcome, more: More | None = None) -> str:
    """Two tables for docs: the arms, with ``more`` columns, and the questions."""
    summary = Summary(outcome)
    titles = [*(column.title for column in ablation.columns), *(more or {}), "trained parameters"]
    lines = [
        f"<!-- {outcome.command}; {outcome.created} -->",
        f"| | {' | '.join(titles)} |",
        "|---|" + "---|" * len(titles),
    ]
    for method in summary.methods:
        found = [_estimate(summary, method, column) for column in ablation.columns]
        cells = [f"{percent(e.value)} ({bounds(e, exact)})" if e else MISSING for e, exact in found]
        lines.append(f"| {method.label} | {' | '.join([*cells, *_more(more, method), _size(method)])} |")
    shorts = [column.short for column in ablation.columns]
    lines += ["", f"| accuracy, in points | {' | '.join(shorts)} |", "|---|" + "---|" * len(shorts)]
    for contrast in contrasts(ablation, outcome):
        cells = [_difference(contrast, column) for column in ablation.columns]
        lines.append(f"| {contrast.question.asks} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ") + "\n"


def figures(ablation: Ablation, outcome: Outcome) -> dict[str, str]:
    """Inline SVG by name."""
    summary = Summary(outcome)
    return {
        "-".join([group, *column.task.split("_"), *([column.kind] if column.kind else [])]): svg
        for group in ablation.groups
        for column in ablation.columns
        if column.kept and (svg := _scatter(ablation, summary, group, column)) is not None
    }


def report(ablation: Ablation, outcome: Outcome, more: More | None = None) -> Document:
    """The report as data; ``more`` columns stand in the tables of arms."""
    summary, drawn, answers = Summary(outcome), figures(ablation, outcome), contrasts(ablation, outcome)
    sections = []
    for group, title in ablation.groups.items():
        blocks: list[Block] = []
        found = [Figure(svg) for name, svg in drawn.items() if name.startswith(f"{group}-")]
        if found:
            blocks.append(FigureRow(found, caption="Up: more text kept. Right: sees better. Bars: 95 % intervals."))
        members = [method for method in summary.methods if _group(ablation, method) == group]
        if members:
            sections.append(Section(title, [], [*blocks, _arms(ablation, summary, members, more)]))
    reading = [
        "Accuracy of the first minus that of the second, in percentage points, paired by item and training seed. "
        "Intervals carry seeds and items; they are not corrected for the number of questions."
    ]
    first = Section("Question by question", reading, [_questions(ablation, outcome, answers)])
    sections = [first, *sections, _repeat(summary)]
    return Document(
        title=outcome.title,
        lead=[*readings.lead(summary), _tally(ablation, answers)],
        sections=sections,
        footer=f"alula, {outcome.created}. Every figure is drawn from the result file alone.",
    )


def _group(ablation: Ablation, method: Method) -> str:
    return next(arm.group for arm in ablation.arms if arm.name == method.name)


def tradeoff(
    ablation: Ablation, summary: Summary, shown: list[Method], column: Column, size: tuple[int, int] = SIZE
) -> str | None:
    """What arms kept against what they see, as SVG; None where the base had nothing to keep, or no arm is shown."""
    sight = next(each for each in ablation.columns if not each.kept)
    dots = []
    for number, method in enumerate(shown):
        seen, kept = _part(summary, method, sight).tuned, _part(summary, method, column).retention
        if kept is not None:
            repeats = tuple(zip(seen.per_seed, kept.per_seed, strict=True)) if len(kept.per_seed) > 1 else ()
            dots.append(Point(method.label, number, seen.mean, kept.mean, repeats))
    if not dots:
        return None
    of_kind = f", {column.kind} turns" if column.kind else ""
    title = f"{summary.title(column.task)}{of_kind}: share of the base's accuracy kept"
    reference = (1.0, "the untuned base")
    across = "visual questions answered right"
    return scatter(dots, title=title, x_title=across, y_title=title, reference=reference, size=size)


def _scatter(ablation: Ablation, summary: Summary, group: str, column: Column) -> str | None:
    extra = ablation.references.get(group, ())
    shown = [m for m in summary.methods if _group(ablation, m) == group or m.name in extra]
    if not any(_group(ablation, method) == group for method in shown):
        return None
    return tradeoff(ablation, summary, shown, column)


def _part(summary: Summary, method: Method, column: Column) -> SeedsComparison:
    if column.kind is None:
        return summary.overall(method, column.task)
    return summary.of_kind(method, column.task, column.kind)


def _estimate(summary: Summary, method: Method, column: Column) -> tuple[Estimate | None, Sequence[Side]]:
    """What a column tells of an arm, and which of its bounds are exact ones."""
    part = _part(summary, method, column)
    if column.kept:
        return (None, ()) if part.retention is None else (part.retention.mean, part.exact)
    return part.tuned.mean, ()


def _more(more: More | None, method: Method) -> list[str]:
    return [cells.get(method.name, MISSING) for cells in (more or {}).values()]


def _arms(ablation: Ablation, summary: Summary, members: list[Method], more: More | None) -> Table:
    base = [Cell(summary.outcome.base.label, note="accuracy before tuning")]
    for column in ablation.columns:
        parts = [_part(summary, method, column).base.mean.value for method in summary.methods]
        base.append(Cell(percent(sum(parts) / len(parts))))
    rows = [[*base, *([Cell("")] * (2 + len(more or {})))]]
    for method in members:
        found = [_estimate(summary, method, column) for column in ablation.columns]
        cells = [Cell(percent(e.value), note=bounds(e, exact)) if e else Cell(MISSING) for e, exact in found]
        cells += [Cell(text) for text in _more(more, method)]
        name = Cell(method.label, note=method.outcome.description)
        rows.append([name, *cells, Cell(_size(method), note=_time(method)), Cell(rates(method.outcome.learning_rates))])
    titles = [*(column.title for column in ablation.columns), *(more or {})]
    return Table(["", *titles, "trained parameters, time", "learning rate"], rows)


def _questions(ablation: Ablation, outcome: Outcome, answers: list[Contrast]) -> Table:
    rows = []
    for contrast in answers:
        cells = []
        for column, found in contrast.differences.items():
            note = bounds(found, contrast.exact[column])
            cells.append(Cell(points(found), note=note, strong=_shown(found), shade=found.value / 0.25))
        rows.append([Cell(contrast.question.asks), *cells])
    titles = [outcome.tasks[c.task] if c.kind is None else c.short for c in ablation.columns]
    return Table(["", *titles], rows, f"Bold: the interval excludes 0. {STARRED}.")


def _said(contrast: Contrast) -> str:
    clear = {column: found for column, found in contrast.differences.items() if _shown(found)}
    other = [column.plain for column in contrast.differences if column not in clear]
    parts = [f"{column.plain} {_difference(contrast, column)} points" for column in clear]
    if other:
        parts.append(f"no difference shown in {listing(other)}")
    return "; ".join(parts)


def _tally(ablation: Ablation, found: list[Contrast]) -> str:
    parts = [f"{sum(_shown(c.differences[column]) for c in found)} in {column.plain}" for column in ablation.columns]
    return f"Of {len(found)} comparisons of one arm with another, an interval excludes no difference: {listing(parts)}."


def _shown(found: Estimate) -> bool:
    return found.low > 0 or found.high < 0


def _difference(contrast: Contrast, column: Column) -> str:
    found = contrast.differences[column]
    return f"{points(found)} ({bounds(found, contrast.exact[column])})"


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
