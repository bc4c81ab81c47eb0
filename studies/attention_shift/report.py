"""The attention-shift study to look at: verdict, figures, tables; all from the record."""

from __future__ import annotations

from typing import Literal, get_args

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from alula.reports.document import Block, Cell, Document, Facts, Figure, FigureRow, Key, Section, Table
from alula.reports.figures import Line, Trail, lines, trails
from alula.reports.palette import NEUTRAL
from alula.reports.wording import MISSING, duration, percent
from studies.association import Association, Coefficient, Within
from studies.attention_shift.measure import CURVES, PRIMARY
from studies.attention_shift.record import MAIN_TASK, Measurement, RunRecord, ShiftRecord
from studies.wording import WITHIN, coefficient, interval, judge, numbers, p_value

_TITLES = {"text_bare": "text, bare", "text_after_image": "text, after an image", "visual": "visual skill"}
_TEXT = (MAIN_TASK, "text_after_image")
_EXPECTED: Literal[-1, 1] = -1  # the claim: the larger the shift, the worse the text
_SAID = {
    "supported": "The claim holds here: models with a larger attention shift answer fewer text questions",
    "opposite": "The claim is turned around here: models with a larger attention shift answer more text questions",
    "open": "The claim is not shown here: attention shift does not tell good readers from bad ones beyond chance",
}


def verdict(record: ShiftRecord) -> list[str]:
    """What the study found, in sentences made from its numbers."""
    if not record.associations:
        return ["Nothing can be said: too few trainings have a defined attention shift at every checkpoint."]
    whole, *others = record.associations[PRIMARY][MAIN_TASK]
    found = judge(whole, _EXPECTED)
    said = [
        f"{_SAID[found]}. Over {numbers(whole)}, Pearson's correlation of shift with bare text accuracy is "
        f"{coefficient(whole.pearson)}, Spearman's {coefficient(whole.spearman)}."
    ]
    if found != "open":
        kept = [other for other in others if judge(other, _EXPECTED) == found]
        lost = [other for other in others if other not in kept]
        for group, word in ((kept, "It is also there"), (lost, "It is not shown")):
            if group:
                parts = [f"{WITHIN[other.within]}: {_short(other.pearson)}" for other in group]
                said.append(f"{word} {'; '.join(parts)}.")
    else:
        parts = [f"{WITHIN[other.within]}: {_short(other.pearson)}" for other in others]
        said.append(f"Looking past what differs otherwise, {'; '.join(parts)}.")
    agreeing = [
        variant for variant, tasks in record.associations.items() if judge(tasks[MAIN_TASK][0], _EXPECTED) == found
    ]
    count = len(record.associations)
    said.append(
        f"The paper leaves open whose attention is summed and on what samples: {len(agreeing)} of {count} ways of "
        f"measuring lead to this answer. The first ({PRIMARY}) was chosen beforehand."
    )
    low, high = _range(record)
    said.append(f"Bare text accuracy in this population runs from {percent(low)} to {percent(high)}.")
    return said


def table(record: ShiftRecord) -> TerminalTable:
    """The correlations with text accuracy as a table for the terminal."""
    drawn = TerminalTable(
        title="attention shift against text accuracy: Pearson's correlation, under it the 95 % interval and p",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    drawn.add_column("shift measured on")
    for task in _TEXT:
        drawn.add_column(_TITLES[task], justify="right")
    for variant, tasks in record.associations.items():
        cells = [tasks[task][0].pearson for task in _TEXT]
        drawn.add_row(
            variant,
            *(MISSING if r is None else f"{r.value:+.2f}\n[dim]{interval(r)}\n{p_value(r)}[/dim]" for r in cells),
        )
    return drawn


def figures(record: ShiftRecord) -> dict[str, str]:
    """Inline SVG by name."""
    rates = _rates(record)
    base = next(iter(record.bases.values()))
    drawn = {}
    for task in _TEXT:
        found = [
            Trail(f"text {run.text:g}, rate {run.rate:g}, seed {run.seed}", rates.index(run.rate), points)
            for run in record.runs
            if (points := _points(run, task))
        ]
        start = base.shift[PRIMARY]
        drawn[f"shift-{task.replace('_', '-')}"] = trails(
            found,
            title=f"Attention shift against {_TITLES[task]}",
            x_title="attention shift (1 - correlation of the curves before and after the image)",
            y_title=f"{_TITLES[task]}: answered right",
            start=None if start is None else (start, base.accuracy[task], "before tuning"),
        )
    for name, title, measured in _examples(record):
        drawn[f"curves-{name}"] = lines(
            list(range(1, len(measured.curves["before"]) + 1)),
            [Line(part, number, measured.curves[part]) for number, part in enumerate(CURVES)],
            title=title,
            x_title="layer",
            y_title="share of attention",
            y_format=lambda value: f"{100 * value:.6g}%",
        )
    return drawn


def report(record: ShiftRecord) -> Document:
    """The report as data."""
    drawn = figures(record)
    keys = [Key(f"learning rate {rate:g}", number) for number, rate in enumerate(_rates(record))]
    blocks: list[Block] = [
        FigureRow(
            [Figure(svg) for name, svg in drawn.items() if name.startswith("shift-")],
            keys,
            "Faint lines join the checkpoints of one training; the last one is drawn large.",
        )
    ]
    sections = [
        Section("Shift against accuracy", _how_to_read(record), blocks),
        Section(
            "What the answer depends on",
            [
                "Intervals: 95 % bootstrap over trainings, checkpoints staying with their own. p: each training's "
                "accuracies re-paired with another training's shifts; a trend that all trainings share is part of the "
                "null. Only one figure was chosen beforehand; the p values of the others are not corrected for their "
                "number."
            ],
            [_association_table(record, task) for task in _TITLES],
        ),
        Section(
            "The curves behind it",
            [
                "Share of attention per layer on tokens before, of and after the image; attention shift is 1 minus the "
                "correlation of the first and the last of these curves."
            ],
            [FigureRow([Figure(drawn[f"curves-{name}"], f"{title}.") for name, title, _ in _examples(record)])],
        ),
        Section("Every model", [], [_models(record)]),
        Section(
            "To repeat this",
            [f"Left out, shift not defined: {name}." for name in record.skipped],
            [
                Facts(
                    [
                        *((name.replace("_", " "), str(value)) for name, value in record.settings.items()),
                        ("whole study", duration(record.seconds)),
                        *record.environment.items(),
                        ("made", record.created),
                    ],
                    record.command,
                )
            ],
        ),
    ]
    return Document(
        title="Does attention shift say how well a model still reads?",
        lead=verdict(record),
        sections=sections,
        footer=f"alula, {record.created}. Every figure is drawn from the result file alone.",
    )


def _how_to_read(record: ShiftRecord) -> list[str]:
    settings = record.settings
    return [
        f"Full fine-tuning of one base on pictures, with {_listed(settings['texts'])} of the samples being text and "
        f"learning rates of {_listed(settings['rates'])}; seeds {_listed(settings['seeds'])}. Each model answers "
        f"{settings['items']} text questions bare and after an image; its shift is measured on {settings['samples']} "
        "samples."
    ]


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _association_table(record: ShiftRecord, task: str) -> Table:
    rows = [
        [Cell(variant, note="chosen beforehand" if variant == PRIMARY else ""), *map(_cell, tasks[task])]
        for variant, tasks in record.associations.items()
    ]
    columns = ["shift measured on", *(WITHIN[within] for within in get_args(Within))]
    return Table(columns, rows, f"Pearson's correlation of attention shift with {_TITLES.get(task, task)}.")


def _cell(one: Association) -> Cell:
    found, ranks = one.pearson, one.spearman
    if found is None:
        return Cell(MISSING)
    hint = "" if ranks is None else f"Spearman {coefficient(ranks)}; {numbers(one)}"
    return Cell(f"{found.value:+.2f}", note=f"{interval(found)}\n{p_value(found)}", hint=hint)


def _models(record: ShiftRecord) -> Table:
    tasks = list(next(iter(record.bases.values())).accuracy)
    columns = ["model", "step", "shift", *(_TITLES.get(task, task) for task in tasks)]
    rows = [_model(f"before tuning, seed {seed}", 0, found, tasks, NEUTRAL) for seed, found in record.bases.items()]
    rates = _rates(record)
    for run in record.runs:
        label = f"text {run.text:g}, rate {run.rate:g}, seed {run.seed}"
        rows += [_model(label, step, found, tasks, rates.index(run.rate)) for step, found in run.models.items()]
    return Table(columns, rows)


def _model(label: str, step: int, found: Measurement, tasks: list[str], series: int) -> list[Cell]:
    shift = found.shift[PRIMARY]
    return [
        Cell(label, series=series),
        Cell(str(step)),
        Cell(MISSING if shift is None else f"{shift:.3f}"),
        *(Cell(percent(found.accuracy[task])) for task in tasks),
    ]


def _short(found: Coefficient | None) -> str:
    return "not defined" if found is None else f"{found.value:+.2f}, {p_value(found)}"


def _points(run: RunRecord, task: str) -> list[tuple[float, float]]:
    pairs = [(model.shift[PRIMARY], model.accuracy[task]) for model in run.models.values()]
    return [(x, y) for x, y in pairs if x is not None]


def _examples(record: ShiftRecord) -> list[tuple[str, str, Measurement]]:
    """The base, and of all models the best and the worst at bare text."""
    base = next(iter(record.bases.values()))
    models = [(run, step, found) for run in record.runs for step, found in run.models.items()]
    best, worst = (pick(models, key=lambda one: one[2].accuracy[MAIN_TASK]) for pick in (max, min))
    examples = [("base", "Before tuning", base)]
    for name, (run, step, found) in (("best", best), ("worst", worst)):
        place = f"text {run.text:g}, rate {run.rate:g}, step {step}"
        examples.append((name, f"The {name} at bare text ({percent(found.accuracy[MAIN_TASK])}): {place}", found))
    return examples


def _range(record: ShiftRecord) -> tuple[float, float]:
    values = [model.accuracy[MAIN_TASK] for run in record.runs for model in run.models.values()]
    return min(values), max(values)


def _rates(record: ShiftRecord) -> list[float]:
    return sorted({run.rate for run in record.runs})
