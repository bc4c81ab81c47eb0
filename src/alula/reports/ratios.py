"""The figures of tasks that count (POPE, CHAIR) as tables, for the page and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

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

_IN_WORDS = {"share": "in %", "number": "lengths in words", "nats": "likelihoods in nats"}
_DIGITS = {"share": 1, "number": 1, "nats": 2}
_UNITS = "what belongs together"
"""pictures, dialogues, groups of questions: the clusters of items"""


def run_sections(run: RunResult) -> list[Section]:
    """Return the figures of one model's counting tasks, a section per topic."""
    sections = []
    for topic, tasks in _by_topic(run.tasks).items():
        tables = [
            Table(
                ["", *(ratio.title for ratio in ratios)],
                [
                    [Cell(_plain(group)), *(_cell(ratio, values[ratio.name]) for ratio in ratios)]
                    for group, values in run.tasks[task].figures.items()
                ],
                f"{_first_upper(run.tasks[task].title)}.",
            )
            for task, ratios in tasks.items()
        ]
        reading = [f"Small: 95 % intervals that resample {_UNITS}. {_legend(tasks.values())}"]
        sections.append(Section(topic, reading, tables))
    return sections


def comparison_sections(summary: Summary) -> list[Section]:
    """Return the figures of base and methods, a section per topic."""
    known = summary.methods[0].outcome.seeds[summary.outcome.seeds[0]].tasks
    many = len(summary.outcome.seeds) > 1
    spread = "least and greatest of the trainings" if many else f"95 % intervals that resample {_UNITS}"
    sections = []
    for topic, tasks in _by_topic(known).items():
        tables = [
            Table(
                ["", *(ratio.title for ratio in ratios)],
                _rows(summary, task, known[task], ratios),
                f"{_first_upper(known[task].title)}.",
            )
            for task, ratios in tasks.items()
        ]
        sections.append(Section(topic, [f"Small: {spread}. {_legend(tasks.values())}"], tables))
    return sections


def _rows(summary: Summary, task: str, first: PairedResult, ratios: Sequence[Ratio]) -> list[list[Cell]]:
    """Base, methods and, of one training each, what they differ by."""
    rows = []
    for group, values in first.figures.items():
        base = [_cell(ratio, values[ratio.name].base) for ratio in ratios]
        rows.append([Cell(f"{_plain(group)}: {summary.outcome.base.label}"), *base])
        for method in summary.methods:
            results = method.outcome.results(task)
            row = [Cell(method.label, series=method.series)]
            row += [_method_cell(ratio, [r.figures[group][ratio.name].tuned for r in results]) for ratio in ratios]
            rows.append(row)
            if len(results) == 1:
                shift = [_cell(ratio, results[0].figures[group][ratio.name].difference, True) for ratio in ratios]
                rows.append([Cell("difference"), *shift])
    return rows


def _by_topic(tasks: Mapping[str, TaskResult] | Mapping[str, PairedResult]) -> dict[str, dict[str, list[Ratio]]]:
    """What tasks count, by what it is about, and by task."""
    found: dict[str, dict[str, list[Ratio]]] = {}
    for name, task in tasks.items():
        for topic, ratios in _topics(task.ratios).items():
            found.setdefault(topic, {})[name] = ratios
    return found


def _topics(ratios: Iterable[Ratio]) -> dict[str, list[Ratio]]:
    found: dict[str, list[Ratio]] = {}
    for ratio in ratios:
        found.setdefault(ratio.topic, []).append(ratio)
    return found


def run_ratio_tables(run: RunResult) -> Iterator[TerminalTable]:
    """Yield a terminal table per counting task of one model and what its figures are about."""
    for task in run.tasks.values():
        for ratios in _topics(task.ratios).values():
            table = _terminal(task.title, [""], ratios)
            for group, values in task.figures.items():
                table.add_row(_plain(group), *(_short(ratio, values[ratio.name]) for ratio in ratios))
            yield table


def paired_ratio_tables(method: MethodOutcome) -> Iterator[TerminalTable]:
    """Yield such tables of a pair of models: base, tuned and their difference."""
    for task in next(iter(method.seeds.values())).tasks.values():
        for ratios in _topics(task.ratios).values():
            table = _terminal(task.title, ["", ""], ratios)
            for group, values in task.figures.items():
                for row, name in enumerate(("base", "tuned", "difference")):
                    cells = [_short(ratio, getattr(values[ratio.name], name), row == 2) for ratio in ratios]
                    table.add_row(_plain(group) if row == 0 else "", name, *cells, end_section=row == 2)
            yield table


def _terminal(title: str, labels: Sequence[str], ratios: Sequence[Ratio]) -> TerminalTable:
    units = {ratio.unit for ratio in ratios}
    told = ", ".join(words for unit, words in _IN_WORDS.items() if unit in units)
    table = TerminalTable(
        title=escape(title),
        caption=f"{told}; under each value half the width of its 95 % interval ({_UNITS} resampled)",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for label in labels:
        table.add_column(label, no_wrap=True)
    for ratio in ratios:
        table.add_column(escape(ratio.title), justify="right", overflow="fold")
    return table


def _short(ratio: Ratio, estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return MISSING
    sides = [abs(bound - estimate.value) for bound in (estimate.low, estimate.high) if math.isfinite(bound)]
    scale = 100 if ratio.unit == "share" else 1
    digits = _DIGITS[ratio.unit]
    margin = f"\n[dim]\N{PLUS-MINUS SIGN}{scale * max(sides):.{digits}f}[/dim]" if sides else ""
    return f"{scale * estimate.value:{'+' if signed else ''}.{digits}f}{margin}"


def _cell(ratio: Ratio, estimate: Estimate | None, signed: bool = False) -> Cell:
    if estimate is None:
        return Cell(MISSING)
    if math.isnan(estimate.low) and math.isnan(estimate.high):
        return Cell(_number(ratio, estimate.value, signed), note="no interval")
    low, high = (
        MISSING if math.isnan(bound) else _number(ratio, bound, signed) for bound in (estimate.low, estimate.high)
    )
    return Cell(_number(ratio, estimate.value, signed), note=f"{low} to {high}")


def _method_cell(ratio: Ratio, estimates: Sequence[Estimate | None]) -> Cell:
    known = [estimate.value for estimate in estimates if estimate is not None]
    if len(estimates) == 1 or not known:
        return _cell(ratio, estimates[0])
    return Cell(
        _number(ratio, sum(known) / len(known)), note=f"{_number(ratio, min(known))} to {_number(ratio, max(known))}"
    )


def _number(ratio: Ratio, value: float, signed: bool = False) -> str:
    written = percent(value) if ratio.unit == "share" else f"{value:.{_DIGITS[ratio.unit]}f}"
    if not any(digit in written for digit in "123456789"):
        return written.replace("-", "")
    return f"+{written}" if signed and value > 0 else written


def _legend(counted: Iterable[Sequence[Ratio]]) -> str:
    better = {ratio.title: ratio.better for ratios in counted for ratio in ratios}
    lower = [title for title, which in better.items() if which == "lower"]
    return f"Lower is better for {', '.join(lower)}." if lower else ""


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain(group: str) -> str:
    return "all" if group == ALL else group.replace("_", " ")
