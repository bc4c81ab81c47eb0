"""The policy study to look at: a verdict per claim, tables and figures; all from the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table as TerminalTable

from alula.reports.document import Cell, Document, Facts, Figure, FigureRow, Section, Table
from alula.reports.figures import Line, lines
from alula.reports.wording import MISSING, bounds, duration, percent, points
from alula.stats import CHANGE, SHARE, Estimate
from studies.grids import Grid, written
from studies.policies.claims import (
    Hard,
    against,
    hard,
    initial,
    later_turns,
    loss,
    named,
    reference,
    ways,
)
from studies.policies.questions import KINDS
from studies.policies.record import PoliciesRecord, among, marks, mean
from studies.policies.rows import LAYERS, LOOKED, SKIPPED, TOKENS, WAYS, kept, share_name, skip_rows
from studies.policies.verdict import verdict as verdict

_DRAWN = {
    "pooling": "down-sampling",
    "random": "random",
    "diversity": "DivPrune",
    "tower-attention": "tower's attention",
    "last-query": "FastV",
    "duplicates": "DART",
    "random-1": "random, layer 1",
}
"""ways drawn, a series each"""
_SEEN: dict[str, tuple[str, ...]] = {
    "colour, shape": ("colour", "shape"), "count": ("count",), "position": ("position",), "existence": ("existence",),
    "descriptions": ("caption",), "digits": ("digits",),
}  # fmt: skip


def grids(record: PoliciesRecord) -> dict[str, Grid]:
    """Every table by the part of the study it belongs to."""
    found: dict[str, Grid] = {}
    shares: list[float] = record.settings["shares"]
    if ways(record):
        found |= {"shares": _shares(record, shares), "kinds": _kinds(record, shares)}
    if {"pooling", "random"} <= {way.name for way in ways(record)}:
        found["hard"] = _hard(record, shares)
    if record.has("random-at-2"):
        found["layers"] = _layers(record)
    if all(model.stays for model in record.models):
        found["stays"] = _stays(record)
    if record.has("withdraw-1"):
        found["withdrawal"] = _withdrawal(record)
    if record.has("skip-mlp-from-0"):
        found |= {"skips": _skips(record), "skipped": _skipped(record), "skipped-kinds": _skipped_kinds(record)}
    if all(model.turns for model in record.models):
        found["turns"] = _turns(record)
    if all(model.pictures for model in record.models):
        found["pictures"] = _pictures(record)
    if all(model.text for model in record.models):
        found["text"] = _text(record)
    return found


def table(record: PoliciesRecord) -> TerminalTable:
    """The criteria at every share, for the terminal; else the first table there is."""
    return next(iter(grids(record).values())).drawn()


def markdown(record: PoliciesRecord) -> str:
    """All tables for docs."""
    return written(grids(record).values())


def figures(record: PoliciesRecord) -> dict[str, str]:
    """Inline SVG by name."""
    drawn: dict[str, str] = {}
    shares: list[float] = sorted(record.settings["shares"])
    here = [name for name in _DRAWN if name in {way.name for way in ways(record)}]
    if here:
        whole = np.ones(len(record.kinds), dtype=bool)
        for name, chosen, told in (
            ("shares", whole, "All questions"),
            ("position", record.of("position"), "Where is it? (position)"),
        ):
            found = [
                Line(
                    _DRAWN[way],
                    series,
                    [*(float(record.right(share_name(way, share))[:, chosen].mean()) for share in shares),
                     float(record.none[:, chosen].mean())],
                )
                for series, way in enumerate(here)
            ]  # fmt: skip
            drawn[name] = lines(
                [*(kept(share) for share in shares), TOKENS],
                found,
                title=f"{told}: answered right",
                x_title=f"image tokens that stay, of {TOKENS}",
                y_title="right",
                y_format=_share,
            )
    if record.has("withdraw-1"):
        layers = range(1, LAYERS)
        found = [
            Line(
                label,
                series,
                [
                    float(each[:, record.of(*kinds)].mean())
                    for each in (*(record.right(f"withdraw-{k}") for k in layers), record.none)
                ],
            )
            for series, (label, kinds) in enumerate(_SEEN.items())
        ]
        drawn["withdrawal"] = lines(
            [*layers, LAYERS], found, title="Withdrawal: answered right, by kind",
            x_title="layers that see pixels, of six", y_title="right", y_format=_share,
        )  # fmt: skip
    if record.has("skip-mlp-from-0"):
        found = []
        for series, each in enumerate(SKIPPED):
            values = [
                float(record.right(f"skip-{each.name}-from-{start}").mean()) if start in each.starts else float("nan")
                for start in range(LAYERS)
            ]
            found.append(Line(_SKIPPED_SHORT[each.name], series, [*values, float(record.none.mean())]))
        drawn["skips"] = lines(
            [*range(LAYERS), LAYERS], found, title="Skipping from a layer on: answered right",
            x_title="first layer in which it is skipped (6: none)", y_title="right", y_format=_share,
        )  # fmt: skip
    return drawn


_SKIPPED_SHORT = {
    "mlp": "MLP",
    "mlp-all": "MLP, whole prompt",
    "attention-own": "attention",
    "attention": "attention and keys",
    "block-own": "block",
}
_SECTIONS = {
    "The frontier: who stays": (("shares", "position"), ("shares", "kinds", "hard", "layers", "stays")),
    "Withdrawal": (("withdrawal",), ("withdrawal",)),
    "Skipping": (("skips",), ("skips", "skipped", "skipped-kinds")),
    "Conversations": ((), ("turns", "pictures")),
    "Text": ((), ("text",)),
}


def report(record: PoliciesRecord) -> Document:
    """The report as data."""
    drawn, made = figures(record), grids(record)
    sections = []
    for title, (pictures, tables) in _SECTIONS.items():
        blocks: list[FigureRow | Table] = []
        if shown := [Figure(drawn[name]) for name in pictures if name in drawn]:
            blocks.append(FigureRow(shown, caption="Means over trainings."))
        blocks += [_table(made[name]) for name in tables if name in made]
        if blocks:
            sections.append(Section(title, [], blocks))
    rows = [
        *((name.replace("_", " "), str(value)) for name, value in record.settings.items()),
        ("whole study", duration(record.seconds)),
        *record.environment.items(),
        ("made", record.created),
    ]
    sections.append(Section("To repeat this", [], [Facts(rows, record.command)]))
    return Document(
        title="Do policies keep answers?",
        lead=verdict(record),
        sections=sections,
        footer=f"alula, {record.created}. Every figure is drawn from the result file alone.",
    )


def _table(grid: Grid) -> Table:
    return Table(grid.columns, [[Cell(text) for text in row] for row in grid.rows], grid.title)


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def told(estimate: Estimate | None) -> str:
    """A difference in points with its interval: ``-2.3 (-5.0 to 0.4)``."""
    return MISSING if estimate is None else f"{points(estimate)} ({bounds(estimate)})"


def _shares(record: PoliciesRecord, shares: Sequence[float]) -> Grid:
    counts = [f"{kept(share)} of {TOKENS}" for share in shares]
    columns = ["answered right", "layer", *counts, "all shares: against random", "against down-sampling"]
    whole = [percent(float(record.none.mean()))] * len(shares)
    rows = [["no policy", "", *whole, told(against(record, None, "random")), told(against(record, None, "pooling"))]]
    for way in ways(record):
        cells = [percent(float(record.right(share_name(way.name, share)).mean())) for share in shares]
        compared = [
            told(against(record, way.name, other)) if other and other != way.name else ""
            for other in (reference(record, way, "random"), reference(record, way, "pooling"))
        ]
        rows.append([way.label, str(way.layer), *cells, *compared])
    for name, label in (("knee", "tower's similarity to the knee"), ("knee-both", "both knees (2409.01162)")):
        if record.has(name):
            share = _mean_kept(record, name)
            right = percent(float(record.right(name).mean()))
            rows.append([f"{label}: {share} stay", "0, 1" if name == "knee-both" else "0", right,
                         *[""] * (len(shares) + 1)])  # fmt: skip
    return Grid("Single questions answered right, by how many image tokens stay", columns, rows)


def _mean_kept(record: PoliciesRecord, row: str) -> str:
    found = [sum(model.stays[row].stays) / model.stays[row].prompts for model in record.models if row in model.stays]
    return f"{np.mean(found):.1f}" if found else MISSING


def _by_kind(record: PoliciesRecord, rows: Mapping[str, str]) -> list[list[str]]:
    found = [["no policy", *(percent(float(record.none[:, record.of(kind)].mean())) for kind in KINDS)]]
    for row, label in rows.items():
        right = record.right(row)
        found.append([label, *(percent(float(right[:, record.of(kind)].mean())) for kind in KINDS)])
    return found


def _kinds(record: PoliciesRecord, shares: Sequence[float]) -> Grid:
    share = LOOKED if LOOKED in shares else shares[0]
    rows = {share_name(way.name, share): way.label for way in ways(record)}
    return Grid(f"By kind of question, {kept(share)} tokens", [f"{kept(share)} of {TOKENS} stay: right", *KINDS],
                _by_kind(record, rows))  # fmt: skip


def _hard(record: PoliciesRecord, shares: Sequence[float]) -> Grid:
    shown = [share for share in (0.5, LOOKED) if share in shares] or list(shares[:1])
    columns = ["of what is right without a policy"]
    split: list[Hard] = [hard(record, share) for share in shown]
    for share, each in zip(shown, split, strict=True):
        columns += [f"{kept(share)} stay: easy ({each.easy.sum(axis=1).mean():.0f})",
                    f"hard ({each.hard.sum(axis=1).mean():.0f})", "hard: against random"]  # fmt: skip
    rows = []
    for way in ways(record):
        cells = []
        for share, each in zip(shown, split, strict=True):
            right, chance = (record.right(share_name(name, share)) for name in (way.name, "random"))
            groups = [among(right, group, SHARE) for group in (each.easy, each.hard)]
            cells += [MISSING if group is None else percent(group.value) for group in groups]
            cells.append("" if way.name == "random" else told(among(right - chance, each.hard, CHANGE)))
        rows.append([way.label, *cells])
    return Grid("Easy: what down-sampling gets right at the same share; hard: what it gets wrong", columns, rows)


def _layers(record: PoliciesRecord) -> Grid:
    names = {"pooling": "down-sampling", "random": "random", "last-query": "last query's attention (FastV)"}
    first = {"pooling": "pooling", "random": "random", "last-query": None}
    second = {"pooling": "pooling-1", "random": "random-1", "last-query": "last-query"}
    rows = []
    for name, label in names.items():
        early = [
            percent(float(record.right(share_name(way, LOOKED)).mean()))
            if way and record.has(share_name(way, LOOKED))
            else MISSING
            for way in (first[name], second[name])
        ]
        late = [percent(float(record.right(f"{name}-at-{layer}").mean())) for layer in range(2, LAYERS)]
        rows.append([label, *early, *late])
    columns = [f"{kept(LOOKED)} of {TOKENS} stay: right", *(f"from layer {layer}" for layer in range(LAYERS))]
    return Grid("By the first layer without the others", columns, rows)


def _stays(record: PoliciesRecord) -> Grid:
    rows = []
    for way in WAYS:
        name = share_name(way.name, LOOKED)
        if all(name in model.stays for model in record.models):
            counts = np.sum([model.stays[name].stays for model in record.models], axis=0).reshape(5, 5)
            rows.append([way.label, *(percent(float(each)) for each in counts.sum(axis=1) / counts.sum())])
    columns = ["of the tokens left in the last layer", "top row", "second", "third", "fourth", "bottom row"]
    return Grid("Where those stand that stay", columns, rows)


def _withdrawal(record: PoliciesRecord) -> Grid:
    columns = ["layers that see pixels", *KINDS, "all", "difference", "first token stays", "whole answer stays",
               "KL of the first token"]  # fmt: skip
    rows = [[f"{LAYERS} (no policy)", *(percent(float(record.none[:, record.of(kind)].mean())) for kind in KINDS),
             percent(float(record.none.mean())), "", "", "", ""]]  # fmt: skip
    for layer in reversed(range(1, LAYERS)):
        right = record.right(f"withdraw-{layer}")
        kinds = [percent(float(right[:, record.of(kind)].mean())) for kind in KINDS]
        first, whole, nats = initial(record, layer)
        rows.append([str(layer), *kinds, percent(float(right.mean())), told(loss(record, f"withdraw-{layer}")),
                     percent(first), percent(whole), f"{nats:.3f}"])  # fmt: skip
    return Grid("Withdrawal by layer: answered right, and what stays of the model's own answers", columns, rows)


def _skips(record: PoliciesRecord) -> Grid:
    rows = []
    for each in SKIPPED:
        cells = [
            percent(float(record.right(f"skip-{each.name}-from-{start}").mean())) if start in each.starts else ""
            for start in range(LAYERS)
        ]
        rows.append([each.label, *cells])
    columns = ["skipped: right", *(f"from layer {start}" for start in range(LAYERS))]
    return Grid("What is skipped, and from which layer on: answered right", columns, rows)


def _skipped(record: PoliciesRecord) -> Grid:
    rows = []
    for row in skip_rows():
        if row.name.endswith("from-0") or "-from-" not in row.name:
            same = percent(float(record.same(row.name).mean()))
            right = percent(float(record.right(row.name).mean()))
            rows.append([row.label, right, told(loss(record, row.name)), same])
    return Grid("Skipped", ["skipped", "right", "difference", "answers that stay"], rows)


def _skipped_kinds(record: PoliciesRecord) -> Grid:
    chosen = ("mlp-from-0", "mlp-all-from-0", "attention-own-from-0", "attention-from-3", "block-own-from-0")
    labels = {row.name: row.label for row in skip_rows()}
    rows = {f"skip-{name}": labels[f"skip-{name}"] for name in chosen}
    return Grid("By kind of question", ["skipped: right", *KINDS], _by_kind(record, rows))


def _turns(record: PoliciesRecord) -> Grid:
    rows = []
    for row in record.models[0].turns:
        talks = [[getattr(model.turns[row], how) for model in record.models] for how in ("alone", "prompt", "chat")]
        cells = [percent(float(marks(each).mean())) for each in talks]
        more = [told(each) for each in later_turns(record, row)] if row != "none" else ["", ""]
        rows.append([named(row), *cells, *more])
    columns = [
        "second question about a picture: right",
        "asked alone",
        "behind the first, one prompt",
        "in a conversation",
        "conversation: loss less that alone",
        "conversation against one prompt",
    ]
    return Grid("The second of two questions about a picture", columns, rows)


def _pictures(record: PoliciesRecord) -> Grid:
    whole = marks([model.pictures["none"] for model in record.models])
    rows = []
    for row in record.models[0].pictures:
        right = marks([model.pictures[row] for model in record.models])
        way, _, share = row.rpartition("-")
        chance = f"random-1-{share}" if way in {each.name for each in WAYS if each.layer} else f"random-{share}"
        compared = ""
        if row not in ("none", chance) and chance in record.models[0].pictures:
            compared = told(mean(right - marks([model.pictures[chance] for model in record.models])))
        rows.append(
            [
                named(row, 3 * TOKENS),
                percent(float(right.mean())),
                "" if row == "none" else told(mean(right - whole)),
                compared,
            ]
        )
    columns = ["the last of three questions about three pictures", "right", "difference", "against random"]
    return Grid("Three pictures in one prompt", columns, rows)


def _text(record: PoliciesRecord) -> Grid:
    rows = []
    for seed, model in record.seeds.items():
        found = model.text
        assert found is not None
        rows.append([f"training seed {seed}", str(found.policies), f"{found.logits:,}", str(len(found.changed)),
                     f"{found.beside:.1g}", str(len(found.turned)), f"{found.host:.1g}", f"{found.largest:.0f}",
                     f"{found.meant_changed} of {found.meant}"])  # fmt: skip
    columns = [
        "text alone",
        "policies",
        "logits under each",
        "policies with other bits",
        "beside pictures: largest change",
        "next tokens changed by",
        "without a policy",
        "largest logit",
        "policies for all tokens: change text",
    ]
    return Grid("Text under policies for image tokens", columns, rows)
