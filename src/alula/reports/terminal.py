"""The same results as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from alula.evaluation import CaptionRun, RunResult
from alula.evaluation.results import Estimate
from alula.reports.names import short_name
from alula.reports.outcome import Outcome
from alula.reports.summary import Summary
from alula.reports.wording import MISSING, STARRED, bounds, percent
from alula.stats import wilson

_BREAKS = 14
"""letters of a word that may break where columns are many"""


def experiment_table(outcome: Outcome) -> Table:
    """Return an experiment as one table that fits 80 columns: a column per method, intervals under the values."""
    summary = Summary(outcome)
    seeds = len(outcome.seeds)
    trainings = f"{seeds} trainings per method" if seeds > 1 else "one model of each"
    meant = "kept: share of the base's accuracy; under it" if summary.text_tasks else "under each share"
    table = Table(
        title=escape(outcome.title),
        caption=f"{meant} the 95 % interval; {trainings}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,  # five methods fill 80 columns
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", min_width=_longest_word(outcome.tasks.values()))
    room = _BREAKS if len(summary.methods) > 1 else 2 * _BREAKS
    for label in (outcome.base.label, *(method.label for method in summary.methods)):
        table.add_column(escape(label), justify="right", width=max(8, _longest_word([label], room)), overflow="fold")
    starred = False
    for task in (*summary.text_tasks, *summary.visual_tasks, *summary.mixed_tasks):
        kept = task in summary.text_tasks
        cells = [f"{percent(summary.base_accuracy(task))}\n[dim]right[/dim]"]
        for method in summary.methods:
            part = summary.overall(method, task)
            spread = part.retention if kept else part.tuned
            cells.append(_two_lines(spread.mean, star=kept and bool(part.exact)) if spread is not None else MISSING)
            starred = starred or (kept and spread is not None and bool(part.exact))
        n = summary.overall(summary.methods[0], task).n
        table.add_row(f"{escape(summary.title(task))} ({n}): {'kept' if kept else 'right'}", *cells)
        if kept:
            parts = [summary.overall(method, task) for method in summary.methods]
            changes = [f"[red]-{_mean(part.lost)}[/red]\n[green]+{_mean(part.gained)}[/green]" for part in parts]
            table.add_row("  items lost\n  gained", "", *changes)
    if starred:
        table.caption = f"{table.caption}\n{STARRED}"
    return table


def captions_table(run: CaptionRun) -> Table:
    """Return what a model made of pictures and captions: recall where it compares them, and its own captions."""
    table = Table(
        title=escape(f"{run.model}: {run.pictures} pictures, {run.references} captions"),
        caption=None if run.recall is not None else "no recall: the model does not compare captions and pictures",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("", "value", "95 % interval"):
        table.add_column(name, justify="left" if name == "" else "right")
    if run.recall is not None:
        for title, found in (
            ("caption to picture", run.recall.caption_to_image),
            ("picture to caption", run.recall.image_to_caption),
        ):
            for k, share in found.items():
                table.add_row(f"{title}, R@{k}", percent(share.value), f"{bounds(share)} %")
    table.add_row("BLEU-4", f"{run.bleu4:.1f}", "")
    table.add_row("CIDEr-D", f"{run.cider.value:.2f}", f"{run.cider.low:.2f} to {run.cider.high:.2f}")
    return table


def run_table(run: RunResult) -> Table:
    """Return one model's scores: a row per task."""
    table = Table(title=escape(short_name(run.model)), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "items", "right", "95 % interval"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task in run.tasks.values():
        share = wilson(sum(item.score for item in task.items), len(task.items))
        table.add_row(escape(task.title), str(len(task.items)), percent(share.value), f"{bounds(share)} %")
    return table


def findings_table(findings: Sequence[tuple[str, str, str, str]]) -> Table:
    """Return findings (question, status, figure, what to do) as a table that fits 80 columns: a block per finding."""
    styles = {"fine": "green", "look": "yellow", "act": "bold red"}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("")
    for title, status, figure, do in findings:
        mark = f"[{styles[status]}]{status}[/]" if status in styles else status
        table.add_row(mark, f"[bold]{escape(title)}[/bold]\n{escape(figure)}\n[dim]{escape(do)}[/dim]")
    return table


def _two_lines(estimate: Estimate, *, star: bool) -> str:
    """The value over half the width of its interval, the larger half where a bound was clipped."""
    sides = [abs(bound - estimate.value) for bound in (estimate.low, estimate.high) if math.isfinite(bound)]
    margin = f"\N{PLUS-MINUS SIGN}{100 * max(sides):.1f}{'*' if star else ''}" if sides else ""
    return f"{percent(estimate.value)}\n[dim]{margin}[/dim]"


def _mean(counts: Sequence[int]) -> str:
    return f"{sum(counts) / len(counts):.1f}".removesuffix(".0")


def _longest_word(texts: Iterable[str], room: int = _BREAKS) -> int:
    """The least width that breaks no word; a word of more letters than there is room for may break."""
    return min(room, max(len(word) for text in texts for word in text.split()))
