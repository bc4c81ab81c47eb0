"""The same results as tables for the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from alula.evaluation import RunResult
from alula.evaluation.results import Estimate
from alula.evaluation.statistics import wilson
from alula.reports.outcome import Outcome
from alula.reports.summary import Summary
from alula.reports.wording import MISSING, bounds, percent


def experiment_table(outcome: Outcome) -> Table:
    """Return an experiment as one table: a row per method, intervals in the second line of each cell."""
    summary = Summary(outcome)
    tasks = [*summary.text_tasks, *summary.visual_tasks, *summary.mixed_tasks]
    seeds = len(outcome.seeds)
    trainings = f"{seeds} trainings per method" if seeds > 1 else "one training per method"
    table = Table(
        title=escape(outcome.title),
        caption=f"kept: share of the base's accuracy; 95 % intervals below; {trainings}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for task in tasks:
        kept = task in summary.text_tasks
        table.add_column(f"{escape(summary.title(task))}\n{'kept' if kept else 'right'}", justify="right")
    if summary.text_tasks:
        table.add_column("text items\nlost / gained", justify="right")
    base = [percent(summary.base_accuracy(task)) for task in tasks]
    table.add_row(f"{escape(outcome.base.label)}\n[dim]untuned: right[/dim]", *base, end_section=True)
    for method in summary.methods:
        cells = []
        for task in tasks:
            part = summary.overall(method, task)
            spread = part.retention if task in summary.text_tasks else part.tuned
            cells.append(_two_lines(spread.mean) if spread is not None else MISSING)
        if summary.text_tasks:
            part = summary.overall(method, summary.text_tasks[0])
            lost, gained = (sum(values) / len(values) for values in (part.lost, part.gained))
            cells.append(f"{lost:g} / {gained:g}" if seeds == 1 else f"{lost:.1f} / {gained:.1f}")
        table.add_row(escape(method.label), *cells)
    return table


def run_table(run: RunResult) -> Table:
    """Return one model's scores: a row per task."""
    table = Table(title=escape(run.model), title_justify="left")
    for name in ("task", "items", "right", "95 % interval"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task in run.tasks.values():
        share = wilson(sum(item.score for item in task.items), len(task.items))
        table.add_row(escape(task.title), str(len(task.items)), percent(share.value), f"{bounds(share)} %")
    return table


def _two_lines(estimate: Estimate) -> str:
    return f"{percent(estimate.value)}\n[dim]{bounds(estimate)}[/dim]"
