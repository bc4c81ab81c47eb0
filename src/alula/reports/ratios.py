"""The figures of tasks that count (POPE, CHAIR) as tables, for the page and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as TerminalTable

from alula.evaluation import RunResult
from alula.evaluation.ratios import ALL
from alula.evaluation.results import Estimate, PairedResult, Ratio, TaskResult
from alula.reports.document import Cell, Section, Table
from alula.reports.outcome import MethodOutcome
from alula.reports.summary import Summary
from alula.reports.wording import MISSING, percent


def run_section(run: RunResult) -> Section | None:
    """Return the figures of one model's counting tasks, or None where it has none."""
    tables = [
        Table(
            ["", *(ratio.title for ratio in task.ratios)],
            [
                [Cell(_plain(group)), *(_cell(ratio, values[ratio.name]) for ratio in task.ratios)]
                for group, values in task.figures.items()
            ],
            task.title.capitalize() + ".",
        )
        for task in run.tasks.values()
        if task.ratios
    ]
    reading = ["Small: 95 % intervals that resample pictures. " + _legend(run.tasks.values())]
    return Section("Objects made up", reading, tables) if tables else None


def comparison_section(summary: Summary) -> Section | None:
    """Return the figures of base and methods, or None where no task has any."""
    tables = []
    for task, first in summary.methods[0].outcome.seeds[summary.outcome.seeds[0]].tasks.items():
        if not first.ratios:
            continue
        rows = []
        for group, values in first.figures.items():
            base = [_cell(ratio, values[ratio.name].base) for ratio in first.ratios]
            rows.append([Cell(f"{_plain(group)}: {summary.outcome.base.label}"), *base])
            for method in summary.methods:
                results = method.outcome.results(task)
                row = [Cell(method.label, series=method.series)]
                row += [
                    _method_cell(ratio, [r.figures[group][ratio.name].tuned for r in results]) for ratio in first.ratios
                ]
                rows.append(row)
        tables.append(Table(["", *(ratio.title for ratio in first.ratios)], rows, first.title.capitalize() + "."))
    many = len(summary.outcome.seeds) > 1
    spread = "least and greatest of the trainings" if many else "95 % intervals that resample pictures"
    known = summary.methods[0].outcome.seeds[summary.outcome.seeds[0]].tasks.values()
    return Section("Objects made up", [f"Small: {spread}. {_legend(known)}"], tables) if tables else None


def run_ratio_tables(run: RunResult) -> Iterator[TerminalTable]:
    """Yield a terminal table per counting task of one model."""
    for task in run.tasks.values():
        if task.ratios:
            table = _terminal(task.title, [""], task.ratios)
            for group, values in task.figures.items():
                table.add_row(_plain(group), *(_short(ratio, values[ratio.name]) for ratio in task.ratios))
            yield table


def paired_ratio_tables(method: MethodOutcome) -> Iterator[TerminalTable]:
    """Yield a terminal table per counting task of a pair of models: base, tuned and their difference."""
    for task in next(iter(method.seeds.values())).tasks.values():
        if task.ratios:
            table = _terminal(task.title, ["", ""], task.ratios)
            for group, values in task.figures.items():
                for row, name in enumerate(("base", "tuned", "difference")):
                    cells = [_short(ratio, getattr(values[ratio.name], name), row == 2) for ratio in task.ratios]
                    table.add_row(_plain(group) if row == 0 else "", name, *cells, end_section=row == 2)
            yield table


def _terminal(title: str, labels: Sequence[str], ratios: Sequence[Ratio]) -> TerminalTable:
    table = TerminalTable(
        title=escape(title),
        caption="in %, lengths in words; under each value half the width of its 95 % interval (pictures resampled)",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for label in labels:
        table.add_column(label)
    for ratio in ratios:
        table.add_column(escape(ratio.title), justify="right")
    return table


def _short(ratio: Ratio, estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return MISSING
    sides = [abs(bound - estimate.value) for bound in (estimate.low, estimate.high) if math.isfinite(bound)]
    scale = 100 if ratio.unit == "share" else 1
    margin = f"\n[dim]\N{PLUS-MINUS SIGN}{scale * max(sides):.1f}[/dim]" if sides else ""
    return f"{scale * estimate.value:{'+' if signed else ''}.1f}{margin}"


def _cell(ratio: Ratio, estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell(MISSING)
    low, high = (MISSING if math.isnan(bound) else _number(ratio, bound) for bound in (estimate.low, estimate.high))
    return Cell(_number(ratio, estimate.value), note=f"{low} to {high}")


def _method_cell(ratio: Ratio, estimates: Sequence[Estimate | None]) -> Cell:
    known = [estimate.value for estimate in estimates if estimate is not None]
    if len(estimates) == 1 or not known:
        return _cell(ratio, estimates[0])
    return Cell(
        _number(ratio, sum(known) / len(known)), note=f"{_number(ratio, min(known))} to {_number(ratio, max(known))}"
    )


def _number(ratio: Ratio, value: float) -> str:
    return percent(value) if ratio.unit == "share" else f"{value:.1f}"


def _legend(tasks: Iterable[TaskResult | PairedResult]) -> str:
    better = {ratio.title: ratio.better for task in tasks for ratio in task.ratios}
    lower = [title for title, which in better.items() if which == "lower"]
    return f"Lower is better for {', '.join(lower)}." if lower else ""


def _plain(group: str) -> str:
    return "all" if group == ALL else group.replace("_", " ")
