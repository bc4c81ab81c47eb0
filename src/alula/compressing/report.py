"""The compression as one HTML page and as a table for the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as TerminalTable

from alula.compressing.record import SKILLS, Compressed, Trial
from alula.evaluation import Comparison, PairedRun
from alula.evaluation.results import Estimate
from alula.reports import comparison_outcome, render
from alula.reports.document import (
    Block,
    Card,
    Cards,
    Cell,
    Document,
    Facts,
    Figure,
    FigureRow,
    Key,
    Section,
    Table,
)
from alula.reports.experiment import item_flips
from alula.reports.figures import Point, scatter
from alula.reports.palette import NEUTRAL
from alula.reports.summary import Summary
from alula.reports.wording import MISSING, STARRED, bounds, count, duration, listing, percent, points, probability

_WITHIN, _CHOSEN = 0, 1
"""series of trials within the budget, and of the one that was saved"""
_TITLES = {"retention": "text", "visual": "images"}


def compress_report(found: Compressed, pairs: PairedRun) -> str:
    """Return the report as one self-contained HTML page.

    Args:
        pairs: what was saved against the model as it was, item by item.
    """
    outcome = comparison_outcome(pairs, command=found.command, seconds=found.seconds)
    return render(
        Document(
            title=f"{_title(found.model)}, smaller",
            lead=[_says(found), pays(found), _what(found)],
            head=[_cards(found)],
            sections=[
                _tried(found),
                _by_task(found, pairs),
                item_flips(Summary(outcome)),
                Section("To repeat this", blocks=[_repeat(found)]),
            ],
            footer=f"alula, {found.created}. What the columns mean: docs/usage/compress.md.",
        )
    )


def compress_table(found: Compressed) -> TerminalTable:
    """Return what was tried as one table, the least first."""
    table = TerminalTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.caption = "text and images: right answers over those of the model as it was"
    table.caption_justify = "left"
    for name in ("", "saved", "text", "images", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for trial in found.trials:
        kept = [percent(trial.kept(name)) for name in SKILLS]
        table.add_row(escape(trial.name), percent(trial.saved, 0), *kept, _verdict(found, trial))
    return table


def pays(found: Compressed) -> str:
    """What the saving is of, and what it is not."""
    if found.kind == "weights":
        on_disk = (
            f"On disk it takes {percent(found.bytes_after / found.bytes_before, 0)}, without its zeros, which alula "
            "reads and nobody else (alula.compress.decode writes it out)."
            if found.coded
            else "Nor is it smaller on disk; --coded leaves the zeros out there."
        )
        return f"It is not faster, and not smaller in memory: zeros are multiplied like other numbers. {on_disk}"
    return (
        f"It is smaller in memory and on disk ({percent(found.bytes_after / found.bytes_before, 0)} of its bytes) and "
        "faster, and every loader reads it. How much faster is not measured here: docs/methods/compress.md has what "
        "arrives of the counted saving."
    )


def _title(name: str) -> str:
    return "/".join(Path(name).parts[-2:]) if os.path.isdir(name) else name


def _says(found: Compressed) -> str:
    trial = found.trial
    kept = listing(
        [f"{percent(trial.kept(name))} of {_TITLES[name]}" for name in SKILLS if trial.kept(name) is not None]
    )
    keeps = f"It keeps {kept}" if kept else "Nothing is known of what it keeps"
    if found.budget is None:
        return f"{_first_up(trial.name)} went, {percent(trial.saved, 0)} of all parameters. {keeps}."
    asked = listing([f"{percent(least)} of {_TITLES[name]}" for name, least in found.budget.items()])
    larger = found.possible[found.possible.index(trial.name) + 1 :]
    end = f"the next larger, {larger[0]!r}, does not" if larger else "it is also the most that could be tried"
    return (
        f"{_first_up(trial.name)} is the largest saving found that keeps {asked}: {percent(trial.saved, 0)} of all "
        f"parameters. {keeps}; {end}. {_doubt(found)}"
    ).strip()


def _doubt(found: Compressed) -> str:
    """Where intervals reach below the budget."""
    low = []
    for name, least in (found.budget or {}).items():
        comparison: Comparison | None = getattr(found.trial, SKILLS[name])
        if comparison is not None and comparison.retention is not None and comparison.retention.low < least:
            low.append(f"{name} down to {percent(comparison.retention.low)}")
    return f"The 95 % intervals reach below the budget ({listing(low)}): more --items narrow them." if low else ""


def _first_up(text: str) -> str:
    return text[:1].upper() + text[1:]


def _what(found: Compressed) -> str:
    scores = f"Calibrated on {found.calibrated}" if found.calibrated else "Chosen without data"
    return (
        f"{found.model_class}, {count(found.parameters)} parameters, {found.layers} decoder layers. {scores}; asked "
        f"were {found.asked}. Every amount was put on the model anew and answered the same questions."
    )


def _cards(found: Compressed) -> Block:
    def right(comparison: Comparison | None, tuned: bool) -> str:
        if comparison is None:
            return MISSING
        return percent((comparison.tuned if tuned else comparison.base).value)

    cards = []
    for title, tuned, series in (("the model as it was", False, NEUTRAL), (found.chosen, True, _CHOSEN)):
        trial = found.trial
        size = found.bytes_after if tuned else found.bytes_before
        values = [
            (right(trial.text, tuned), "of text right"),
            (right(trial.visual, tuned), "of images right"),
            (f"{count(size)}B", "on disk"),
        ]
        cards.append(Card(title, values, series=series))
    return Cards(cards)


def _tried(found: Compressed) -> Section:
    words = [
        "Saved are parameters of the whole model, embeddings and towers among them, that are gone or zero. Kept are "
        "right answers over those of the model as it was, with paired 95 % intervals."
    ]
    if found.budget is not None:
        words.append(f"Tried by bisection among {len(found.possible)} amounts: skill is taken to fall with the amount.")
    if any(each is not None and each.exact for trial in found.trials for each in (trial.text, trial.visual)):
        words.append(f"{STARRED}.")
    figures = [figure for name in SKILLS if (figure := _drawn(found, name)) is not None]
    blocks: list[Block] = []
    if figures:
        keys = [Key("saved here", _CHOSEN)]
        if found.budget is not None:
            keys += [Key("within the budget", _WITHIN), Key("not within", NEUTRAL)]
        blocks.append(FigureRow(figures, legend=keys))
    columns = ["", "saved", "text kept", "images kept", "text right", "images right", ""]
    rows = [
        [
            Cell(trial.name, strong=trial.name == found.chosen, series=_CHOSEN if trial.name == found.chosen else None),
            Cell(percent(trial.saved)),
            _kept(trial.text),
            _kept(trial.visual),
            _right(trial.text),
            _right(trial.visual),
            Cell(_verdict(found, trial)),
        ]
        for trial in found.trials
    ]
    blocks.append(Table(columns, rows))
    return Section("What was tried", words, blocks)


def _drawn(found: Compressed, name: str) -> Figure | None:
    drawn = []
    for trial in found.trials:
        comparison: Comparison | None = getattr(trial, SKILLS[name])
        if comparison is None or comparison.retention is None:
            continue
        within = trial.margin(found.budget or {}) >= 0
        series = _CHOSEN if trial.name == found.chosen else _WITHIN if within else NEUTRAL
        drawn.append(Point(trial.name, series, Estimate(trial.saved, trial.saved, trial.saved), comparison.retention))
    if not drawn:
        return None
    least = (found.budget or {}).get(name)
    reference = (1.0, "the model as it was") if least is None else (least, f"asked for: {percent(least, 0)}")
    title = f"{_TITLES[name]}: kept against saved"
    svg = scatter(
        drawn, title=title, x_title="parameters saved", y_title=f"{_TITLES[name]} kept", reference=reference,
        through=sorted((point.x.value, point.y.value) for point in drawn),
    )  # fmt: skip
    return Figure(svg)


def _kept(comparison: Comparison | None) -> Cell:
    if comparison is None or comparison.retention is None:
        return Cell(MISSING)
    shade = max(-1.0, min(1.0, 4 * (comparison.retention.value - 1)))
    return Cell(percent(comparison.retention.value), bounds(comparison.retention, comparison.exact), shade=shade)


def _right(comparison: Comparison | None) -> Cell:
    if comparison is None:
        return Cell(MISSING)
    changed = f"{comparison.lost} lost, {comparison.gained} gained of {comparison.n}"
    return Cell(percent(comparison.tuned.value), changed, hint=f"{points(comparison.difference)} points")


def _verdict(found: Compressed, trial: Trial) -> str:
    if trial.name == found.chosen:
        return "saved here"
    return "within" if trial.margin(found.budget or {}) >= 0 else "not within"


def _by_task(found: Compressed, pairs: PairedRun) -> Section:
    """What was saved against the model as it was, task by task and family by family."""
    rows = []
    for task in pairs.tasks.values():
        families = task.families if len(task.families) > 1 else {}
        rows.append(_paired(Cell(task.title, strong=True), task.overall, task.overall.p_value))
        rows += [_paired(Cell(f"· {name.replace('_', ' ')}"), part, part.p_holm) for name, part in families.items()]
    parts = [part for task in pairs.tasks.values() for part in (task.overall, *task.families.values())]
    starred = f" {STARRED}." if any(part.exact for part in parts) else ""
    words = (
        "The same questions in the same words, item by item. Differences are in points, with paired 95 % intervals; p "
        "is of the exact McNemar test, corrected over the families of a task (Holm)."
        f"{starred}"
    )
    columns = ["", "questions", "as it was", found.chosen, "difference", "lost", "gained", "p"]
    return Section(f"{_first_up(found.chosen)}, task by task", [words], [Table(columns, rows)])


def _paired(name: Cell, part: Comparison, p_value: float) -> list[Cell]:
    return [
        name,
        Cell(str(part.n)),
        Cell(percent(part.base.value)),
        Cell(percent(part.tuned.value)),
        Cell(
            points(part.difference),
            bounds(part.difference, part.exact),
            shade=max(-1.0, min(1.0, 4 * part.difference.value)),
        ),
        Cell(str(part.lost)),
        Cell(str(part.gained)),
        Cell(probability(p_value)),
    ]


def _repeat(found: Compressed) -> Facts:
    settings, state = found.settings, found.conditions
    rows: list[tuple[str, str]] = [
        ("model", found.model),
        ("what goes", f"{found.kind}, by {settings['method']}, tokens {settings['tokens']}"),
        ("calibrated on", found.calibrated or "nothing"),
        ("asked", found.asked),
        ("precision", f"{state.dtype} on {state.device}"),
        ("seed", str(settings["seed"])),
        *((f"template: {name}", str(value)) for name, value in settings["template"].items()),
        ("whole run", duration(found.seconds)),
        *found.environment.items(),
    ]
    return Facts(_plain(rows), found.command)


def _plain(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in rows if value]
