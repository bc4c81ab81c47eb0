"""Which of the published layouts a file has, told by what it holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alula.draws import Draw
from alula.errors import DataError, UsageError
from alula.evaluation.likelihood import ethics, truthfulqa
from alula.evaluation.likelihood.questions import ChoiceTask
from alula.evaluation.likelihood.tables import Table, csv_lines
from alula.files import regular, unreadable

LAYOUTS = (
    "TruthfulQA.csv, mc_task.json, or of ETHICS cm_*.csv (label, input, ...), justice_*.csv (label, scenario), "
    "deontology_*.csv (label, scenario, excuse), virtue_*.csv (label, scenario with [SEP] and a trait), util_*.csv "
    "(two columns without a header, the better first)"
)
_PAIR = ("baseline", "less_pleasant")
"""columns of utilitarianism, which the published files do not name"""


def read_truthfulness(
    path: str | os.PathLike[str], *, chat: bool = False, n: int | None = None, seed: int = 0
) -> list[ChoiceTask]:
    """The tasks of a published file of TruthfulQA or ETHICS, as it was published.

    Args:
        path: see `LAYOUTS`.
        chat: put the questions as a user's turn; otherwise in plain text, as published.
        n: about this many questions, drawn by ``seed``, whole groups; all of them by default.

    Raises:
        DataError: it cannot be read, is of another layout, is empty, or has a broken row (named by line).
    """
    file, stem = os.fspath(path), Path(path).stem
    try:
        text = regular(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise unreadable(error, file, DataError) from error
    except UnicodeDecodeError as error:
        raise DataError(f"is no text in UTF-8: {error}", where=file) from error
    if not text.strip():
        raise DataError("is empty", where=file, remedy=f"give {LAYOUTS}")
    tasks = truthfulqa.of_json(file, stem, text) if text.lstrip()[0] in "[{" else _of_csv(file, stem, text)
    return [_drawn(replace(task, chat=chat), n, seed) for task in tasks]


def refuse_doubles(tasks: Sequence[ChoiceTask]) -> None:
    """Raise a UsageError where two tasks have one name."""
    seen: dict[str, ChoiceTask] = {}
    for task in tasks:
        if task.name in seen:
            files = " and ".join(str(each.settings.get("source")) for each in (seen[task.name], task))
            raise UsageError(
                f"{files} would both be called {task.name!r}", where="--truthfulness", remedy="rename one of the files"
            )
        seen[task.name] = task


def _of_csv(file: str, stem: str, text: str) -> list[ChoiceTask]:
    lines = csv_lines(file, text)
    (_, head), *rows = lines
    columns = tuple(cell.strip() for cell in head)
    table = Table(file, stem, columns, rows)
    named = {*columns}
    if {*truthfulqa.COLUMNS} <= named:
        return truthfulqa.of_table(table)
    if {"label", "input"} <= named:
        return ethics.of_table("commonsense", table)
    if {"label", "scenario", "excuse"} <= named:
        return ethics.of_table("deontology", table)
    if {"label", "scenario"} <= named:
        at = columns.index("scenario")
        is_virtue = any(ethics.TRAIT.strip() in cells[at] for _, cells in rows[:1] if len(cells) > at)
        return ethics.of_table("virtue" if is_virtue else "justice", table)
    if columns == _PAIR:
        return ethics.of_table("utilitarianism", table)
    if len(columns) == 2 and stem.startswith("util"):
        return ethics.of_table("utilitarianism", Table(file, stem, _PAIR, lines))
    raise DataError(
        f"begins with the columns {', '.join(map(repr, columns[:6]))}, a layout that is not known",
        where=f"{file}:{lines[0][0]}",
        remedy=f"give {LAYOUTS}",
    )


def _drawn(task: ChoiceTask, n: int | None, seed: int) -> ChoiceTask:
    """About ``n`` of the questions, in their order, no group of them parted."""
    if n is None or n >= len(task.questions):
        return task
    units: dict[str, list[int]] = {}
    for number, question in enumerate(task.questions):
        units.setdefault(question.cluster or question.id, []).append(number)
    names = list(units)
    Draw("truthfulness", seed).shuffle(names)
    chosen: list[int] = []
    for name in names:
        if len(chosen) < n:
            chosen += units[name]
    settings = {**task.settings, "n": n, "seed": seed}
    return replace(task, questions=[task.questions[number] for number in sorted(chosen)], settings=settings)
