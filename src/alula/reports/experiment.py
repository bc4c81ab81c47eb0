"""The report of an experiment: what each way of tuning kept, what it learned, item by item."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alula.evaluation.ratios import ALL
from alula.evaluation.references import REFERENCES
from alula.evaluation.results import Estimate
from alula.reports import readings
from alula.reports.document import (
    Block,
    Browser,
    Card,
    Cards,
    Cell,
    Document,
    Exchange,
    Facts,
    Figure,
    FigureRow,
    Key,
    Section,
    Table,
    render,
)
from alula.reports.figures import Curve, Point, Sides, butterfly, curves, scatter
from alula.reports.outcome import CurvePoint, Outcome, rewound
from alula.reports.palette import NEUTRAL
from alula.reports.ratios import comparison_sections
from alula.reports.summary import TEXT, VISUAL, Method, Summary
from alula.reports.wording import MISSING, bounds, count, duration, listing, percent, rates, ratio_of_perplexities

_FULL_SHADE = 0.25
"""a loss of a quarter of the base's accuracy has the full colour"""


def experiment_report(outcome: Outcome | Mapping[str, Any] | str | os.PathLike[str]) -> str:
    """Return the HTML report of an experiment.

    Args:
        outcome: the record, its JSON value, or the file it was saved to.

    Raises:
        EvaluationError: a file that is not an `Outcome`.
    """
    if isinstance(outcome, str | os.PathLike):
        outcome = Outcome.load(Path(outcome))
    elif not isinstance(outcome, Outcome):
        outcome = Outcome.model_validate(outcome)
    return render(document(outcome))


def document(outcome: Outcome) -> Document:
    """Return the report as data, for callers who add sections of their own."""
    summary = Summary(outcome)
    sections = [
        _tradeoff(summary),
        _figures_at_a_glance(summary),
        text_families(summary),
        _visual_families(summary),
        *comparison_sections(summary),
        dialogues(summary),
        _training(summary),
        item_flips(summary),
        _repeat(summary),
    ]
    return Document(
        title=outcome.title,
        lead=readings.lead(summary),
        head=[_cards(summary)],
        sections=[section for section in sections if section is not None],
        footer=f"alula, {outcome.created}. Every figure is drawn from the result file alone.",
    )


def _cards(summary: Summary) -> Block:
    cards = []
    for method in summary.methods:
        values = []
        if summary.text_tasks:
            values.append(_kept(summary, method))
        if summary.visual_tasks:
            seen = summary.overall(method, summary.visual_tasks[0]).tuned
            values.append((percent(seen.mean.value), "of images right"))
        cards.append(Card(method.label, values, method.outcome.description, method.series))
    return Cards(cards)


def _kept(summary: Summary, method: Method) -> tuple[str, str]:
    """The share of the base's text answers that was kept; where it has none, what became of the references."""
    task = summary.text_tasks[0]
    kept = summary.overall(method, task).retention
    weighed = [result.figures.get(ALL, {}).get(REFERENCES.name) for result in method.outcome.results(task)]
    shifts = [change.difference.value for change in weighed if change is not None and change.difference is not None]
    if kept is not None or len(shifts) < len(weighed):
        return percent(kept.mean.value if kept else None), "of text kept"
    return f"x {ratio_of_perplexities(sum(shifts) / len(shifts))}", "perplexity of the references"


def _tradeoff(summary: Summary) -> Section | None:
    if not (summary.text_tasks and summary.visual_tasks):
        return None
    sight = summary.visual_tasks[0]
    figures = []
    for task in summary.text_tasks[:2]:
        points = []
        for method in summary.methods:
            seen, kept = summary.overall(method, sight).tuned, summary.overall(method, task).retention
            if kept is not None:
                repeats = tuple(zip(seen.per_seed, kept.per_seed, strict=True)) if len(kept.per_seed) > 1 else ()
                points.append(Point(method.label, method.series, seen.mean, kept.mean, repeats))
        if points:
            title = f"{summary.title(task)}: share of the base's accuracy kept"
            svg = scatter(
                points,
                title=title,
                x_title="visual questions answered right",
                y_title=title,
                reference=(1.0, "the base"),
            )
            figures.append(Figure(svg))
    if not figures:
        return None
    many = len(summary.outcome.seeds) > 1
    caption = "Up: more text kept. Right: sees better. Bars: 95 % intervals" + (
        " over seeds and items; faint markers: single trainings." if many else " over items."
    )
    keys = [Key(method.label, method.series) for method in summary.methods]
    return Section("Kept against learned", readings.tradeoff(summary), [FigureRow(figures, keys, caption)])


def _figures_at_a_glance(summary: Summary) -> Section:
    tasks = [*summary.text_tasks, *summary.visual_tasks, *summary.mixed_tasks]
    known = any(outcome.seconds for method in summary.methods for outcome in method.outcome.seeds.values())
    columns = ["", *(_heading(summary, task) for task in tasks)]
    base = [
        Cell(summary.outcome.base.label, note="the base"),
        *(Cell(percent(summary.base_accuracy(t))) for t in tasks),
    ]
    if known:
        columns += ["trained parameters, time", "learning rate"]
        base += [Cell("")] * 2
    rows = [base]
    for method in summary.methods:
        row = [Cell(method.label, series=method.series)]
        for task in tasks:
            part = summary.overall(method, task)
            if task not in summary.text_tasks:
                row.append(_interval_cell(part.tuned.mean))
            elif part.retention is None:
                row.append(Cell(MISSING, note=f"{percent(part.tuned.mean.value)} right"))
            else:
                row.append(Cell(percent(part.retention.mean.value), note=bounds(part.retention.mean, part.exact)))
        if known:
            trainings = list(method.outcome.seeds.values())
            sizes = [t.trainable_parameters for t in trainings if t.trainable_parameters is not None]
            times = [t.seconds for t in trainings if t.seconds is not None]
            row += [
                Cell(count(sizes[0]) if sizes else MISSING, note=duration(sum(times) / len(times)) if times else ""),
                Cell(rates(method.outcome.learning_rates)),
            ]
        rows.append(row)
    return Section("The figures", readings.intervals(summary), [Table(columns, rows)])


def _heading(summary: Summary, task: str) -> str:
    return f"{summary.title(task)}: {'kept' if task in summary.text_tasks else 'right'}"


def _interval_cell(estimate: Estimate) -> Cell:
    return Cell(percent(estimate.value), note=bounds(estimate))


def text_families(summary: Summary) -> Section | None:
    """Which text skills every method kept; None where no text was asked."""
    if not summary.text_tasks:
        return None
    tables = [_retention_table(summary, task) for task in summary.text_tasks]
    return Section("Which text skills were kept", readings.families(summary), tables)


def _retention_table(summary: Summary, task: str) -> Table:
    families = _families(summary, task)
    base_row = [Cell(f"{summary.outcome.base.label}: right")]
    base_row += [Cell(_whole(_base(summary, task, family))) for family in families]
    rows = [[*base_row, Cell(_whole(summary.base_accuracy(task)))]]
    for method in summary.methods:
        row = [Cell(method.label, series=method.series)]
        result = summary.result(method, task)
        for family, part in [*((each, result.groups[each]) for each in families), ("all", result.overall)]:
            if part.retention is None:
                row.append(Cell(MISSING, hint="the base answers none of these"))
                continue
            kept = part.retention.mean
            row.append(
                Cell(
                    _whole(kept.value),
                    shade=(kept.value - 1) / _FULL_SHADE,
                    strong=part is not result.overall and summary.beyond_chance(method, task, family),
                    hint=f"{method.label}, {_plain(family)}: kept {percent(kept.value)} "
                    f"({bounds(kept, part.exact)}), of {part.n} items lost {_each(part.lost)}, "
                    f"gained {_each(part.gained)}",
                )
            )
        rows.append(row)
    caption = f"{summary.title(task).capitalize()}: accuracy of the base, and the share of it each method kept, in %."
    return Table(["", *map(_plain, families), "all"], rows, caption, heat=True)


def _families(summary: Summary, task: str) -> list[str]:
    """Families of a task; none where there is but one, of which the figure of all has said it."""
    found = list(summary.result(summary.methods[0], task).groups)
    return found if len(found) > 1 else []


def _base(summary: Summary, task: str, family: str) -> float:
    """The base's accuracy on a family, averaged over what each method was compared with."""
    parts = [summary.result(method, task).groups[family].base.mean.value for method in summary.methods]
    return sum(parts) / len(parts)


def _visual_families(summary: Summary) -> Section | None:
    if not summary.visual_tasks:
        return None
    tables = []
    for task in summary.visual_tasks:
        families = _families(summary, task)
        base = [Cell(summary.outcome.base.label)]
        for share in [*(_base(summary, task, family) for family in families), summary.base_accuracy(task)]:
            base.append(Cell(_whole(share), shade=0.9 * share))
        rows = [base]
        for method in summary.methods:
            result = summary.result(method, task)
            row = [Cell(method.label, series=method.series)]
            for part in [*(result.groups[family] for family in families), result.overall]:
                seen = part.tuned.mean
                row.append(Cell(_whole(seen.value), shade=0.9 * seen.value, hint=f"{bounds(seen)} %, {part.n} items"))
            rows.append(row)
        caption = f"{summary.title(task).capitalize()}: answered right, in %."
        tables.append(Table(["", *map(_plain, families), "all"], rows, caption, heat=True))
    return Section("What they see", readings.sight(summary), tables)


def dialogues(summary: Summary) -> Section | None:
    """Text and visual turns of dialogues by what came before them; None where no dialogues were asked."""
    if not summary.mixed_tasks:
        return None
    tables: list[Block] = []
    for task in summary.mixed_tasks:
        labels = summary.methods[0].outcome.results(task)[0].columns.labels
        if "before" not in labels:
            continue
        before = sorted(labels["before"].values, key=lambda v: (v != "nothing", len(v), v))
        for kind in (TEXT, VISUAL):
            tables.append(_dialogue_table(summary, task, kind, before))
    return Section("In dialogues", readings.dialogues(summary), tables) if tables else None


def _dialogue_table(summary: Summary, task: str, kind: str, before: Sequence[str]) -> Table:
    def parts(method: Method) -> list[Any]:
        groups = summary.result(method, task, ("kind", "before")).groups
        return [*(groups.get(f"{kind}, {history}") for history in before), summary.of_kind(method, task, kind)]

    columns = ["", *(_history(value) for value in before), "all"]
    rows = []
    bases = zip(*(parts(method) for method in summary.methods), strict=True)
    base = [sum(p.base.mean.value for p in ps) / len(ps) if all(ps) else None for ps in bases]
    shades = [None if kind == TEXT or value is None else 0.9 * value for value in base]
    shown = (Cell("" if value is None else _whole(value), shade=s) for value, s in zip(base, shades, strict=True))
    rows.append([Cell(summary.outcome.base.label), *shown])
    for method in summary.methods:
        row = [Cell(method.label, series=method.series)]
        for part in parts(method):
            if part is None:
                row.append(Cell(""))
                continue
            change = part.difference.mean.value
            row.append(
                Cell(
                    _whole(part.tuned.mean.value),
                    shade=change / _FULL_SHADE if kind == TEXT else 0.9 * part.tuned.mean.value,
                    hint=f"{part.n} turns, {100 * change:+.1f} points from the base "
                    f"({bounds(part.difference.mean, part.exact)})",
                )
            )
        rows.append(row)
    kind_of = "Text" if kind == TEXT else "Visual"
    caption = f"{kind_of} turns answered right, in %, by what came before (T: text turn, V: turn with an image)."
    return Table(columns, rows, caption, heat=True)


def _history(value: str) -> str:
    return "nothing" if value == "nothing" else "after " + value


def _training(summary: Summary) -> Section | None:
    found: dict[str, list[Curve]] = {}
    shared = [curve for curve in summary.outcome.shared_curves.values() if curve]
    if shared:
        for stage, runs in _by_stage(shared).items():
            found.setdefault(stage, []).append(Curve("shared by all", NEUTRAL, runs))
    for method in summary.methods:
        lines = [outcome.curve for _, outcome in sorted(method.outcome.seeds.items()) if outcome.curve]
        for stage, runs in _by_stage(lines).items():
            found.setdefault(stage, []).append(Curve(method.label, method.series, runs))
    if not found:
        return None
    figures = [
        Figure(curves(lines, title=f"Training loss of stage {stage}"), f"Stage {stage}.")
        for stage, lines in found.items()
    ]
    return Section("How training went", readings.training(summary), [FigureRow(figures)])


def _by_stage(runs: Sequence[Sequence[CurvePoint]]) -> dict[str, list[tuple[list[float], list[float]]]]:
    stages: dict[str, list[tuple[list[float], list[float]]]] = {}
    for run in runs:
        for stage in dict.fromkeys(point.stage for point in run):
            points = rewound([point for point in run if point.stage == stage])
            if len(points) > 1:
                stages.setdefault(stage, []).append(([p.step for p in points], [p.loss for p in points]))
    return stages


def item_flips(summary: Summary) -> Section:
    """How many items were lost and gained, and some of them to read."""
    tasks = summary.text_tasks or list(summary.outcome.tasks)
    figures = []
    for task in tasks[:2]:
        sides = []
        for method in summary.methods:
            part = summary.overall(method, task)
            pairs = list(zip(part.lost, part.gained, strict=True))
            mean_lost, mean_gained = (sum(values) / len(values) for values in (part.lost, part.gained))
            repeats = pairs if len(pairs) > 1 else ()
            sides.append(Sides(method.label, method.series, mean_lost, mean_gained, part.n, repeats))
        n = sides[0].n
        figures.append(
            Figure(butterfly(sides, title=f"{summary.title(task)}: of {n} items, right before or after only"))
        )
    groups, exchanges = [], []
    seed = summary.outcome.seeds[0]
    for task in tasks:
        for method in summary.methods:
            training = method.outcome.seeds.get(seed)
            if training is None:
                continue
            result = training.tasks[task]
            name = f"{method.name}/{task}"
            shown = len(result.lost) + len(result.gained)
            if not shown:
                continue
            whole = result.overall.lost + result.overall.gained
            remark = f"{result.overall.lost} lost, {result.overall.gained} gained"
            remark += f"; {shown} shown, spread over the skills" if shown < whole else ""
            groups.append((name, f"{method.label}, {summary.title(task)}", remark))
            for direction, flips in (("lost", result.lost), ("gained", result.gained)):
                exchanges += [
                    Exchange(name, _plain(f.family), direction, f.prompt, f.gold, f.base_answer, f.tuned_answer)
                    for f in flips
                ]
    caption = "Lost: right before and wrong after; gained: the reverse." + (
        " Bars: means over trainings; dots: single trainings." if len(summary.outcome.seeds) > 1 else ""
    )
    blocks: list[Block] = [FigureRow(figures, caption=caption)]
    if exchanges:
        blocks.append(Browser(groups, exchanges))
    return Section("Items lost and gained", readings.flips(summary), blocks)


def _repeat(summary: Summary) -> Section:
    outcome = summary.outcome
    first = next(iter(summary.methods[0].outcome.seeds.values())).conditions
    decoding = first.decoding
    how = "sampled" if decoding.do_sample else "greedy" if decoding.num_beams == 1 else f"{decoding.num_beams} beams"
    rows = [
        ("seeds", listing([str(seed) for seed in outcome.seeds])),
        ("whole run", duration(outcome.seconds)),
        ("decoding", f"{how}, batches of {first.batch_size}"),
        ("precision", f"{first.dtype} on {first.device}"),
        (
            "attention",
            listing([f"{part} {name}" for part, name in first.backend.items()]) if first.backend else MISSING,
        ),
        *(("policy", told) for told in first.policies_in_words),
        *((name, value) for name, value in {**first.versions, **outcome.environment}.items()),
        ("made", outcome.created),
    ]
    digests = {task: summary.methods[0].outcome.results(task)[0].items_digest[:16] for task in outcome.tasks}
    rows += [(f"items, {outcome.tasks[task]}", digest) for task, digest in digests.items()]
    notes = sorted(
        {note for m in summary.methods for s in m.outcome.seeds.values() for r in s.tasks.values() for note in r.notes}
    )
    return Section("To repeat this", [f"Note: {note}." for note in notes], [Facts(rows, outcome.command)])


def _whole(share: float | None) -> str:
    return percent(share, 0).removesuffix("%").rstrip()


def _each(counts: Sequence[int]) -> str:
    return " / ".join(map(str, counts))


def _plain(name: str) -> str:
    return name.replace("_", " ")
