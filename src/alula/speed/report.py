"""The measurement as one HTML page and as a table for the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as TerminalTable

from alula.evaluation.results import Comparison, Estimate
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
    render,
)
from alula.reports.figures import Point, scatter
from alula.reports.palette import NEUTRAL
from alula.reports.wording import MISSING, STARRED, bounds, count, duration, percent, points
from alula.speed.advice import Recommendation, frontier, recommend, warnings
from alula.speed.record import Part, Row, Speed, Spread

_BEST, _OTHERS = 1, 0
"""series of the recommended policy, and of the rest of the frontier"""


def speed_report(speed: Speed, budget: Mapping[str, float]) -> str:
    """Return the report as one self-contained HTML page."""
    found = recommend(speed, budget)
    sections = [
        _frontier(speed, found),
        _all(speed, found),
        _by_difficulty(speed, found),
        _by_kind(speed, found),
        _refused(speed),
        Section("To repeat this", blocks=[_repeat(speed)]),
    ]
    return render(
        Document(
            title=f"Speed of {_title(speed.model)}",
            lead=[*found.says, _what(speed)],
            head=[_cards(speed, found), *_warned(speed)],
            sections=[section for section in sections if section is not None],
            footer=f"alula, {speed.created}. What the columns mean: docs/usage/speed.md.",
        )
    )


def speed_table(speed: Speed) -> TerminalTable:
    """Return the measurement as one table: a row per policy, fastest answers first."""
    table = TerminalTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    right = any(row.accuracy is not None for row in speed.rows)
    legend = "same: whole answers as without it" + ("; right: right answers" if right else "")
    table.caption = f"of the model without a policy; counted: matrix products of a prompt\n{legend}"
    table.caption_justify = "left"
    table.add_column("", min_width=16)
    for name in ("answer", "prompt", "step", "counted", "cache", "same", *(["right"] if right else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _ordered(speed):
        if row.refused:
            table.add_row(escape(row.name), "refused")
            continue
        values = [_ratio(row.answer), _ratio(row.prefill), _ratio(row.step), _plain(row.operations), _plain(row.cache)]
        values.append(percent(row.agreement, 0))
        table.add_row(escape(row.name), *values, *([percent(row.accuracy, 0)] if right else []))
    return table


def _title(name: str) -> str:
    return "/".join(Path(name).parts[-2:]) if os.path.isdir(name) else name


def _what(speed: Speed) -> str:
    asked = f"{speed.n} questions ({speed.source})"
    if speed.invented:
        asked += ", about which nothing is known but how the model itself answers: name --data to measure on yours"
    return (
        f"{speed.model_class}, {count(speed.parameters)} parameters, {speed.layers} decoder layers; {asked}. Prompts "
        f"of {speed.prompt_tokens} tokens, {speed.image_tokens} of them of images (medians), in batches of "
        f"{speed.settings['batch_size']}." + (f" Passed over: {speed.passed_over}." if speed.passed_over else "")
    )


def _cards(speed: Speed, found: Recommendation) -> Block:
    host = speed.host
    without = [
        (duration_of(host.prefill_seconds), "a batch of prompts"),
        (duration_of(host.step_seconds), "a further token"),
        (percent(host.decode_share, 0), "of an answer behind the prompt"),
        (f"{count(host.cache_bytes)}B", "cache behind a prompt"),
    ]
    if host.accuracy is not None:
        without.append((percent(host.accuracy.value), "right"))
    cards = [Card("no policy", without, series=NEUTRAL)]
    row = found.row or found.nearest
    if row is not None:
        values = [
            (_ratio(row.answer), "of the time of an answer"),
            (percent(row.agreement), "of answers the same"),
            (percent(row.cache, 0), "of the cache"),
        ]
        if row.accuracy is not None:
            values.append((percent(row.accuracy), "right"))
        cards.append(Card(row.name if found.row else f"nearest: {row.name}", values, series=_BEST))
    return Cards(cards)


def _warned(speed: Speed) -> list[Block]:
    found = warnings(speed)
    if not found:
        return []
    rows = [[Cell("look", shade=-0.4, strong=True), Cell(text)] for text in found]
    return [Table(["", "where a policy cannot pay"], rows, words=True)]


def _frontier(speed: Speed, found: Recommendation) -> Section:
    figures = [Figure(_drawn(speed, found, "agreement"), "Whole answers that are the model's own, token for token.")]
    if any(row.accuracy is not None for row in speed.rows):
        figures.append(Figure(_drawn(speed, found, "accuracy"), "Right answers."))
    legend = [Key("on the frontier", _OTHERS), Key("not on it", NEUTRAL)]
    if found.row or found.nearest:
        legend.insert(0, Key("recommended" if found.row else "nearest to what is asked", _BEST))
    words = (
        "To the left is faster, up is better. On the frontier are those that no other is both faster than and at least "
        "as good as; point at the small ones to read their names. Bars: lowest and highest ratio of the rounds across, "
        "Wilson's 95 % interval up."
    )
    return Section("The frontier", [words], [FigureRow(figures, legend=legend)])


def _drawn(speed: Speed, found: Recommendation, quality: str) -> str:
    best = found.row or found.nearest
    on = frontier(speed.rows, quality)
    drawn = []
    for row in speed.rows:
        if row.answer is None or getattr(row, quality) is None:
            continue
        is_best = best is not None and row.name == best.name
        series = _BEST if is_best else _OTHERS if row in on else NEUTRAL
        across = Estimate(row.answer.median, row.answer.low, row.answer.high)
        drawn.append(Point(row.name, series, across, _estimate(row, quality), faint=not is_best and row not in on))
    through = sorted((_median(row), getattr(row, quality)) for row in on)
    asked = found.budget.get(quality)
    if quality == "accuracy" and asked is None and speed.host.accuracy is not None:
        reference = speed.host.accuracy.value, "no policy"
    else:
        reference = (1.0, "no policy") if asked is None else (asked, f"asked for: {percent(asked, 0)}")
    return scatter(
        drawn,
        title=f"{quality} against time",
        x_title="time of a whole answer, of no policy",
        y_title="the same answer" if quality == "agreement" else "right",
        reference=reference,
        through=through,
    )


def _estimate(row: Row, quality: str) -> Estimate:
    part = row.parts["all"]
    if quality == "agreement":
        return part.agreement
    assert part.right is not None
    return part.right.tuned


def _median(row: Row) -> float:
    assert row.answer is not None
    return row.answer.median


def _ordered(speed: Speed) -> list[Row]:
    return sorted(speed.rows, key=lambda row: _median(row) if row.answer is not None else float("inf"))


def _all(speed: Speed, found: Recommendation) -> Section:
    right = any(row.accuracy is not None for row in speed.rows)
    columns = ["", "whole answer", "prompt", "step", "counted", "cache", "keys kept", "same answer"]
    rows = []
    for row in _ordered(speed):
        if row.refused:
            continue
        cells = [
            _named(row, found),
            _timed(row.answer),
            _timed(row.prefill),
            _timed(row.step),
            Cell(_plain(row.operations), hint=f"of a step: {_plain(row.step_operations)}"),
            Cell(_plain(row.cache), hint=f"{count(row.cache_bytes)}B behind one prompt"),
            Cell(percent(row.kept, 0)),
            Cell(percent(row.agreement), bounds(row.parts["all"].agreement)),
        ]
        rows.append([*cells, *([_right(row.parts["all"].right)] if right else [])])
    own = speed.itself
    words = [
        "Times are ratios to the model without a policy, which ran beside each in every round: medians, with the "
        "lowest and the highest below. Counted are the matrix products of one prompt, the vision tower's among them; "
        "keys kept are those of image tokens, mean over layers; intervals are 95 %. Below right answers stands the "
        f"difference to no policy, in points, with its paired interval ({STARRED}).",
        f"The model beside itself takes {own.median:.2f} ({own.low:.2f} to {own.high:.2f}): smaller differences are "
        "noise.",
    ]
    return Section("All policies", words, [Table([*columns, *(["right"] if right else [])], rows)])


def _by_difficulty(speed: Speed, found: Recommendation) -> Section | None:
    words = (
        "Easy are the questions that plain down-sampling gets right when it keeps the same share of image tokens "
        "(pooling in front of the first layer, at the share of the column “keys kept”); hard are the others. A "
        "clever choice of tokens has to show on the hard ones. A pooling row is its own measure."
    )
    return _parted(speed, found, ("easy", "hard"), "Easy and hard questions", words)


def _by_kind(speed: Speed, found: Recommendation) -> Section | None:
    words = (
        "Questions of which the data says that they ask where something is, or to read. Averages over a benchmark hide "
        "these: they are what few tokens lose first."
    )
    return _parted(speed, found, ("localization", "reading"), "Localization and reading", words)


def _parted(speed: Speed, found: Recommendation, names: Sequence[str], title: str, words: str) -> Section | None:
    there = [name for name in names if any(name in row.parts for row in speed.rows)]
    if not there:
        return None
    with_right = [name for name in there if any(_part_right(row, name) is not None for row in speed.rows)]
    columns = ["", *(f"{name}: same answer" for name in there), *(f"{name}: right" for name in with_right)]
    rows = []
    for row in _ordered(speed):
        if row.refused:
            continue
        same = [_agreeing(row.parts.get(name)) for name in there]
        rows.append([_named(row, found), *same, *(_right(_part_right(row, name)) for name in with_right)])
    return Section(title, [words], [Table(columns, rows)])


def _part_right(row: Row, name: str) -> Comparison | None:
    return row.parts[name].right if name in row.parts else None


def _agreeing(part: Part | None) -> Cell:
    if part is None:
        return Cell(MISSING)
    return Cell(percent(part.agreement.value, 0), f"of {part.n}", hint=bounds(part.agreement))


def _right(right: Comparison | None) -> Cell:
    """Accuracy, with the paired difference below."""
    if right is None:
        return Cell(MISSING)
    lost = f"{right.lost} lost, {right.gained} gained of {right.n}"
    difference = f"{points(right.difference)} ({bounds(right.difference, right.exact)})"
    return Cell(percent(right.tuned.value), difference, shade=4 * right.difference.value, hint=lost)


def _refused(speed: Speed) -> Section | None:
    rows = [[Cell(row.name), Cell(row.refused)] for row in speed.rows if row.refused]
    if not rows:
        return None
    return Section("Refused by this model", blocks=[Table(["", "why"], rows, words=True)])


def _named(row: Row, found: Recommendation) -> Cell:
    is_best = found.row is not None and row.name == found.row.name
    return Cell(row.name, hint=str(row.policies), strong=is_best, series=_BEST if is_best else None)


def _timed(spread: Spread | None) -> Cell:
    if spread is None:
        return Cell(MISSING)
    return Cell(_ratio(spread), f"{spread.low:.2f} to {spread.high:.2f}", shade=1 - spread.median)


def _ratio(spread: Spread | None) -> str:
    return MISSING if spread is None else f"{spread.median:.2f}"


def _plain(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def duration_of(seconds: float) -> str:
    """``0.0123`` -> ``"12 ms"``."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else duration(seconds)


def _repeat(speed: Speed) -> Facts:
    settings, state = speed.settings, speed.conditions
    rows = [
        ("model", speed.model),
        ("questions", f"{speed.n}: {speed.source}"),
        ("answers", f"greedy, of {settings['max_new_tokens']} tokens at most"),
        ("rounds", f"{settings['rounds']}, of {settings['timed']} batches, {settings['steps']} tokens each"),
        ("clock", speed.clock),
        ("precision", f"{state.dtype} on {state.device}"),
        ("attention", ", ".join(f"{part} {name}" for part, name in state.backend.items())),
        ("seed", str(settings["seed"])),
        *((f"template: {name}", str(value)) for name, value in settings["template"].items()),
        ("whole run", duration(speed.seconds)),
        *speed.environment.items(),
    ]
    return Facts(rows, speed.command)
