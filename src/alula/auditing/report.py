"""The audit as one HTML page: what each figure says for this model first, then the figure, its nulls and its source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from alula.auditing.record import Audit
from alula.auditing.text import AFTER_IMAGE, BARE
from alula.auditing.verdicts import (
    Finding,
    Status,
    findings,
    interval,
    main_pair,
    number,
    overlap_pair,
    unrelated,
    way_to_ceiling,
    word,
)
from alula.evaluation.statistics import wilson
from alula.probes import AlignmentResult
from alula.probes.results import Curve, Estimate
from alula.reports import comparison_outcome
from alula.reports.document import Block, Cell, Document, Facts, Figure, FigureRow, Key, Section, Table, render
from alula.reports.experiment import item_flips, text_families
from alula.reports.figures import Line, cloud, lines
from alula.reports.palette import NEUTRAL
from alula.reports.summary import Summary
from alula.reports.wording import bounds, count, duration, listing, percent

_SERIES = {"image": 1, "text": 0, "video": 2, "audio": 3, "before": 0, "after": 2, "between": 3, "system": 5}
"""colours and markers: words are blue and images orange in every figure"""
_SHADES = {Status.FINE: 0.55, Status.LOOK: -0.4, Status.ACT: -1.0, Status.OPEN: None}
_MEANING = {
    Status.FINE: "as one would wish",
    Status.LOOK: "worth a look",
    Status.ACT: "something is wrong",
    Status.OPEN: "the data does not decide",
}
_IMA = ("Implicit multimodal alignment, arXiv 2405.16700", "https://arxiv.org/abs/2405.16700")
_WINGS = ("Wings, arXiv 2406.03496", "https://arxiv.org/abs/2406.03496")
_WANDA = ("Wanda, arXiv 2306.11695", "https://arxiv.org/abs/2306.11695")
_CKA = ("Similarity of representations, arXiv 1905.00414", "https://arxiv.org/abs/1905.00414")


def audit_report(audit: Audit) -> str:
    """Return the report of an audit as one self-contained HTML page."""
    found = findings(audit)
    drawn = {
        "text": _text,
        "attention": _attention,
        "alignment": _alignment,
        "geometry": _geometry,
        "lens": _lens,
        "overlap": _overlap,
    }
    sections = [
        Section(
            finding.title,
            [finding.says, _advice(finding), *(_notes(audit) if finding.section == "text" else ())],
            drawn[finding.section](audit),
            links,
        )
        for finding in found
        for links in [_LINKS[finding.section]]
    ]
    sections.append(Section("To repeat this", blocks=[_repeat(audit)]))
    return render(
        Document(
            title=f"Audit of {audit.title}",
            lead=_lead(audit, found),
            head=[_glance(found)],
            sections=sections,
            footer=f"alula, {audit.created}. Intervals: 95 %. Methods: docs/audit.md and docs/probes.md of alula.",
        )
    )


def _notes(audit: Audit) -> list[str]:
    """What the figures of text leave out."""
    assert audit.text is not None
    own = [f"{task.title}: {note}" for task in audit.text.run.tasks.values() for note in task.notes]
    pairs = audit.text.pairs
    return [f"Note: {note}." for note in [*own, *(pairs.tasks[BARE].notes if pairs is not None else ())]]


def _advice(finding: Finding) -> str:
    return finding.do if finding.status is Status.FINE else f"What to do: {finding.do}"


_LINKS = {
    "text": [],
    "attention": [_WINGS],
    "alignment": [_IMA, _CKA],
    "geometry": [_IMA],
    "lens": [_IMA],
    "overlap": [_WANDA, _IMA],
}


def _lead(audit: Audit, found: Sequence[Finding]) -> list[str]:
    acting = [finding for finding in found if finding.status is Status.ACT]
    looking = [finding for finding in found if finding.status is Status.LOOK]
    if acting:
        first = acting[0].says
    elif looking:
        first = f"Nothing is wrong outright; {_questions(looking)} worth a look."
    elif all(finding.status is Status.OPEN for finding in found):
        first = "This data decides nothing yet: see below what to measure instead."
    else:
        first = "Nothing found that needs doing."
    what = f"{audit.model_class}, {count(audit.parameters)} parameters, {audit.layers} decoder layers"
    measured = f"measured on {audit.measured} conversations with images ({audit.data})" if audit.data else ""
    asked = ""
    if audit.text is not None:
        asked = f"{len(audit.text.run.tasks[BARE].items)} text questions"
        asked += f" put to it and to {audit.base}" if audit.base else " put to it"
    done = listing([part for part in (measured, asked) if part])
    passed = [
        f"{many} {kind}"
        for many, kind in ((audit.without_image, "without an image"), (audit.unusable, "unusable"))
        if many
    ]
    return [first, f"{what}; {done}." + (f" Passed over: {listing(passed)}." if passed else "")]


def _questions(found: Sequence[Finding]) -> str:
    return f"{len(found)} of its figures {'are' if len(found) > 1 else 'is'}"


def _glance(found: Sequence[Finding]) -> Table:
    rows = [
        [
            Cell(finding.title),
            Cell(str(finding.status), shade=_SHADES[finding.status], strong=True, hint=_MEANING[finding.status]),
            Cell(finding.figure),
            Cell(finding.against),
        ]
        for finding in found
    ]
    meaning = "; ".join(f"{status}: {text}" for status, text in _MEANING.items())
    return Table(["", "", "figure (95 % interval)", "held against"], rows, f"At a glance ({meaning}).", words=True)


# -- text -------------------------------------------------------------------------------------------------------------


def _text(audit: Audit) -> list[Block]:
    assert audit.text is not None
    blocks: list[Block] = []
    rows = []
    for name in (BARE, AFTER_IMAGE):
        task = audit.text.run.tasks.get(name)
        if task is not None:
            share = wilson(sum(item.score for item in task.items), len(task.items))
            rows.append([Cell(task.title), Cell(str(len(task.items))), Cell(percent(share.value), note=bounds(share))])
    columns = ["questions", "asked", "right"]
    pairs = audit.text.pairs
    if pairs is not None:
        columns.append("base right")
        whole = pairs.tasks[BARE].overall
        rows[0].append(Cell(percent(whole.base.value), note=bounds(whole.base)))
        for row in rows[1:]:
            row.append(Cell("", hint="a text LLM is asked without images"))
    caption = "Answers to text, greedy." + (
        " The base was asked in the model's own template, token by token the same." if audit.text.in_its_words else ""
    )
    blocks.append(Table(columns, rows, caption))
    if pairs is not None:
        only_bare = pairs.model_copy(update={"tasks": {BARE: pairs.tasks[BARE]}})
        summary = Summary(comparison_outcome(only_bare, command=audit.command, seconds=audit.seconds))
        kept = text_families(summary)
        blocks += kept.blocks if kept is not None else ()
        if pairs.tasks[BARE].overall.lost + pairs.tasks[BARE].overall.gained:
            blocks += item_flips(summary).blocks
    return blocks


# -- attention --------------------------------------------------------------------------------------------------------


def _attention(audit: Audit) -> list[Block]:
    result = audit.attention
    assert result is not None
    figures = []
    for branch, curves in result.curves.items():
        shares = [_line(s, _SERIES[s], curve) for s, curve in curves.items() if _any(curve)]
        what = "decoder and learners together" if branch == "total" else "the decoder's own attention"
        figures += _over_depth(
            shares, title=f"Share of attention by layer: {what}", x_title="decoder layer",
            y_title=f"share of attention, {what}", y_format=lambda v: f"{100 * v:.4g}%", least=0.02,
        )  # fmt: skip
    last = list(result.curves)[-1]
    sides = [_standard(side, result.curves[last][side]) for side in ("before", "after")]
    if all(any(math.isfinite(v) for v in line.values) for line in sides):
        what = "before and after, with the learners" if last == "total" else "before and after"
        figures += _over_depth(
            sides, f"The mean curves {what}, each brought to mean 0: do they rise and fall together?",
            title="The two curves on one scale", x_title="decoder layer",
            y_title="attention to text, in standard deviations", least=1.0,
        )  # fmt: skip
    tables = [
        [Cell({"main": "decoder", "total": "with learners"}[branch]), Cell(interval(shift))]
        for branch, shift in result.shift.items()
    ]
    reach = unrelated(audit.layers)
    apart = f", {result.undefined} of them without text on one side of the image" if result.undefined else ""
    caption = (
        f"{result.samples} samples{apart}. Attention shift "
        "is 1 minus the correlation over layers of the curves before and after: 0 where they move together, 2 where "
        f"they move against each other. Null: curves that have nothing to do with each other lie between "
        f"{1 - reach:.2f} and {1 + reach:.2f} in 95 % of cases (t test over {audit.layers} layers; neighbouring layers "
        "are alike, so the true range is wider)."
    )
    return [
        *_row(figures, "Bands: 95 % bootstrap intervals over samples. All rows ask, as in Eq. 1."),
        Table(["branch", "attention shift"], tables, caption),
    ]


# -- alignment --------------------------------------------------------------------------------------------------------


def _alignment(audit: Audit) -> list[Block]:
    assert audit.alignment is not None
    name, pair = main_pair(audit.alignment)
    kind = name.split("-")[0]
    site = pair.sites["stream"]
    null = [(min(0.0, entry.mean), entry.high) for entry in site.nulls["centred_matched"]]
    own = [
        _line("own text", _SERIES[kind], site.centred_matched),
        _line("others' text", NEUTRAL, site.centred_mismatched, dashed=True),
    ]
    for control, label, series in (("noise", "noise image", 5), ("untrained", "untrained", 3)):
        found = _of_pair(audit.controls.get(control), name)
        if found:
            own.append(_line(label, series, found, dashed=True))
    matched = _over_depth(
        own, "Grey: what 95 % of shuffled pairs stay below. Above it, images are near their own words.",
        title=f"{kind} rows and text, common direction removed", x_title="state of the stream",
        y_title=f"cosine of {kind} rows with text, common direction removed", null=null, least=0.05,
    )  # fmt: skip
    plain = _over_depth(
        [
            _line("own text", _SERIES[kind], site.matched),
            _line("others' text", NEUTRAL, site.mismatched, dashed=True),
        ],
        "With the common direction left in, the two are hard to tell apart.",
        title=f"{kind} rows and text as they are", x_title="state of the stream",
        y_title=f"cosine of {kind} rows with text, as they are", least=0.05,
    )  # fmt: skip
    raw = _over_depth(
        [_line("same state", _SERIES["text"], site.all_pairs), _line("rows on entry", 4, site.input_prompt)],
        "Over all pairs, matched or not: how near the two kinds are as kinds.",
        title="The published alignment score by state", x_title="state of the stream",
        y_title="cosine over all pairs of samples (IMA score)", least=0.05,
    )  # fmt: skip
    debiased, knn = site.nulls["cka_debiased"], site.nulls["mutual_knn"]
    near = _over_depth(
        [
            _flat("debiased CKA", 2, site.cka_debiased),
            _line("shared neighbours", 3, site.mutual_knn),
            _flat("CKA, shuffled", 2, [entry.high for entry in debiased], dashed=True),
            _flat("shared, shuffled", 3, [entry.high for entry in knn], dashed=True),
        ],
        "Dashed: what 95 % of shuffled pairs stay below.",
        title="Same structure on both sides", x_title="state of the stream", y_title="debiased CKA, shared neighbours",
        least=0.05,
    )  # fmt: skip
    rows = [
        [
            Cell("own minus other text"),
            Cell(_maybe(pair.contrast_score)),
            *(Cell(_maybe(_score(found, name))) for found in audit.controls.values()),
        ],
        [
            Cell("IMA score, same state"),
            Cell(_maybe(pair.score)),
            *(Cell(_maybe(_published(found, name))) for found in audit.controls.values()),
        ],
    ]
    headings = {"noise": "noise for images", "untrained": "untrained connector"}
    columns = ["mean over states", "this model", *(headings[control] for control in audit.controls)]
    caption = (
        f"{pair.samples} samples; intervals, neighbours ({pair.neighbours} each, chance "
        f"{number(pair.neighbours_chance)}) and nulls from {pair.kept} of them. State 0 is the decoder's input. Text: "
        "all of it behind the first image."
    )
    return [
        *_row([*matched, *near, *plain, *raw], "Bands: 95 % bootstrap intervals over samples."),
        Table(columns, rows, caption),
    ]


def _of_pair(result: AlignmentResult | None, pair: str) -> Curve:
    return result.pairs[pair].sites["stream"].centred_matched if result is not None and pair in result.pairs else ()


def _score(result: AlignmentResult, pair: str) -> Estimate | None:
    return result.pairs[pair].contrast_score if pair in result.pairs else None


def _published(result: AlignmentResult, pair: str) -> Estimate | None:
    return result.pairs[pair].score if pair in result.pairs else None


# -- geometry ---------------------------------------------------------------------------------------------------------


def _geometry(audit: Audit) -> list[Block]:
    assert audit.geometry is not None
    site = audit.geometry.sites["stream"]
    kinds = {name: site.kinds[name] for name in ("text", *(k for k in site.kinds if k != "text")) if name in site.kinds}
    norms = _over_depth(
        [_line(name, _SERIES[name], kind.norms["median"]) for name, kind in kinds.items()],
        "First rows and sinks apart. Bands: 95 % bootstrap intervals over samples.",
        title="Length of rows", x_title="state of the stream", y_title="median length of a row",
    )  # fmt: skip
    cones = _over_depth(
        [
            *(_flat(f"{name}-{name}", _SERIES[name], kind.within) for name, kind in kinds.items()),
            *(_flat(pair, NEUTRAL, values) for pair, values in site.between.items()),
        ],
        "Exact means over all pairs of samples; 0 for unrelated directions.",
        title="Narrow cones", x_title="state of the stream", y_title="cosine of different samples", least=0.1,
    )  # fmt: skip
    changes = [_line(name, _SERIES[name], kind.change[1]) for name, kind in kinds.items() if 1 in kind.change]
    changed = _over_depth(
        changes, "1: the block leaves the row's direction as it is.", title="How much a block changes a row",
        x_title="decoder layer", y_title="cosine of a row before and after the block", least=0.05,
    )  # fmt: skip
    factor = f"{audit.geometry.settings['sink_factor']:g}"
    sinks = _over_depth(
        [_flat(name, _SERIES[name], kind.sink_share) for name, kind in kinds.items()],
        f"Rows more than {factor} times as long as the median of all rows of their sample.",
        title="Sinks", x_title="state of the stream", y_title="rows that are sinks",
        y_format=lambda v: f"{100 * v:.4g}%", least=0.01,
    )  # fmt: skip
    blocks: list[Block] = [*_row([*norms, *cones, *changed, *sinks])]
    panels = [
        Figure(cloud(p.points, [_SERIES[kind] for kind in p.kinds], title=f"state {p.state}"))
        for p in audit.geometry.projections
    ]
    if panels:
        keys = [Key(name, _SERIES[name]) for name in kinds]
        blocks.append(
            FigureRow(
                panels, keys, "Each point: the mean of one sample's rows of a kind, in the plane (PCA).", small=True
            )
        )
    rows = [
        [
            Cell(name, series=_SERIES[name]),
            Cell(str(kind.samples)),
            Cell(number(_finite(kind.sink_norm), 1)),
            Cell(number(max(kind.highest), 1)),
        ]
        for name, kind in kinds.items()
    ]
    blocks.append(
        Table(
            ["kind", "samples", "longest sinks, on average", "longest row"],
            rows,
            f"Over all states. First rows, the usual sink: {number(max(site.first_norm), 1)} long on average at the "
            "state where they are longest.",
        )
    )
    return blocks


# -- lens -------------------------------------------------------------------------------------------------------------


def _lens(audit: Audit) -> list[Block]:
    lens = audit.lens
    assert lens is not None
    order = ("text", *(kind for kind in lens.kinds if kind != "text"))
    kinds = {name: lens.kinds[name] for name in order if name in lens.kinds}
    uniform = math.log(lens.vocabulary)
    entropy = _over_depth(
        [
            *(_line(name, _SERIES[name], kind.entropy) for name, kind in kinds.items()),
            _flat("no preference", NEUTRAL, [uniform] * len(lens.states), dashed=True),
        ],
        "0: one word for certain. Bands: 95 % bootstrap intervals over samples.",
        title="How sure a row is of its word", xs=lens.states, x_title="state of the stream",
        y_title="entropy over the vocabulary, nats",
    )  # fmt: skip
    pairs = [
        _flat(f"{pair.replace('||', ' and ')}", _SERIES[pair.split("||")[0]], values.jensen_shannon)
        for pair, values in lens.divergence.items()
        if pair.endswith("||text")
    ]
    if pairs:
        pairs.append(_flat("nothing shared", NEUTRAL, [math.log(2)] * len(lens.states), dashed=True))
    shared = _over_depth(
        pairs, "Of the mean distributions of both kinds; 0: the same words.", xs=lens.states, least=0.1,
        title="Do images and text stand for the same words?", x_title="state of the stream",
        y_title="Jensen-Shannon divergence, nats",
    )  # fmt: skip
    blocks: list[Block] = [*_row([*entropy, *shared])]
    example = next((example for example in lens.examples if example.kind != "text"), None)
    if example is not None:
        rows = []
        for position, tokens, shares in zip(example.positions, example.tokens, example.shares, strict=True):
            cells = [
                Cell(_clip(word(audit, t[0])), shade=0.9 * s[0], hint=f"{word(audit, t[0])}: {percent(s[0], 0)}")
                for t, s in zip(tokens, shares, strict=True)
            ]
            rows.append([Cell(f"row {position}"), *cells])
        rows = rows[:: max(1, len(rows) // 8)][:8]
        caption = (
            f"What some {example.kind} rows of one sample would say if a state were the last: the likeliest token, "
            "darker where it is surer."
        )
        blocks.append(Table(["", *(f"state {state}" for state in lens.states)], rows, caption, heat=True))
    tops = [
        [
            Cell(f"state {state}"),
            *(
                Cell(", ".join(f"{_clip(word(audit, t))} {percent(s, 0)}" for t, s in kind.top[at][:4]))
                for kind in kinds.values()
            ),
        ]
        for at, state in enumerate(lens.states)
    ]
    caption = "The tokens that most often come first, with the share of rows they come first in."
    blocks.append(Table(["", *(f"{name} rows" for name in kinds)], tops, caption, words=True))
    return blocks


def _clip(text: str, most: int = 11) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


# -- overlap ----------------------------------------------------------------------------------------------------------


def _overlap(audit: Audit) -> list[Block]:
    result = audit.overlap
    assert result is not None
    pair = overlap_pair(result)
    assert pair is not None
    found = result.pairs[pair]
    kind = pair.split("-")[0]
    drawn = [
        _flat(f"{kind} and text", _SERIES[kind], [layer.iou for layer in found.layers]),
        _flat("same kind", 2, [layer.ceiling for layer in found.layers], dashed=True),
        _flat("shared size", NEUTRAL, [layer.shared_magnitude for layer in found.layers], dashed=True),
        _flat("chance", 5, [layer.chance for layer in found.layers], dashed=True),
    ]
    weights = _over_depth(
        drawn,
        f"The {percent(1 - result.sparsity, 0)} of each row's weights with the highest |weight| times activation, over "
        "rows of either kind. Same kind: one kind on two halves of the samples, the most one can expect. Shared size: "
        "what remains when channels are shuffled (null).",
        title="Overlap of the weights that matter", x_title="decoder layer",
        y_title="kept by both over kept by either", least=0.1,
    )  # fmt: skip
    beyond = _over_depth(
        [
            _flat("of the way", _SERIES[kind], way_to_ceiling(result, pair)),
            _flat("beyond size", 3, [layer.beyond_magnitude for layer in found.layers]),
        ],
        "Of the way: how far the overlap lies from shared size (0) to same kind (1). Beyond size: overlap of the "
        "weights that matter although they are small.",
        title="Shared use", x_title="decoder layer", y_title="share", least=0.2,
    )  # fmt: skip
    matrices = list(dict.fromkeys(name.split(".", 2)[2] for name in found.matrices))
    rows = []
    for layer in range(len(found.layers)):
        cells = []
        for matrix in matrices:
            overlap = found.matrices.get(f"layers.{layer}.{matrix}")
            if overlap is None:
                cells.append(Cell(""))
                continue
            reach = overlap.ceiling - overlap.shared_magnitude
            share = (overlap.iou - overlap.shared_magnitude) / reach if reach > 0 else math.nan
            hint = f"shared size {number(overlap.shared_magnitude)}, same kind {number(overlap.ceiling)}"
            shade = 0.9 * min(1.0, max(0.0, share)) if math.isfinite(share) else None
            cells.append(Cell(number(overlap.iou), shade=shade, hint=hint))
        rows.append([Cell(f"layer {layer}"), *cells])
    return [
        *_row([*weights, *beyond]),
        Table(
            ["", *(name.split(".")[-1] for name in matrices)],
            rows,
            "By matrix: overlap, darker where it is nearer to what one kind has with itself.",
            heat=True,
        ),
    ]


# -- the rest ---------------------------------------------------------------------------------------------------------


def _repeat(audit: Audit) -> Facts:
    rows = [
        ("model", audit.model),
        ("base", audit.base or "none"),
        ("class", audit.model_class),
        ("precision", f"{audit.dtype} on {audit.device}"),
        ("samples", f"{audit.measured}, {audit.data}" if audit.data else "none"),
        ("seed", str(audit.facts["seed"])),
        *((f"template: {name}", str(value)) for name, value in audit.facts["template"].items()),
        ("time", duration(audit.seconds)),
    ]
    if audit.memory is not None:
        rows += [
            (
                "memory of the probes",
                f"{count(audit.memory.held)}B kept; at most {count(audit.memory.bound)}B, however many samples",
            ),
            *(
                (f"most used by the {place}", f"{count(value)}B, model and batches included")
                for place, value in audit.memory.peak.items()
            ),
        ]
    return Facts([*rows, *audit.environment.items()], audit.command)


def _line(label: str, series: int, curve: Curve, *, dashed: bool = False) -> Line:
    return Line(label, series, [e.value for e in curve], [(e.low, e.high) for e in curve], dashed)


def _over_depth(
    found: Sequence[Line], caption: str = "", *, xs: Sequence[float] | None = None, **options: Any
) -> list[Figure]:
    """Lines over layers or states, which are numbered from 0 unless named; no figure where nothing is defined."""
    defined = [line for line in found if any(math.isfinite(value) for value in line.values)]
    if not defined:
        return []
    return [Figure(lines(range(len(defined[0].values)) if xs is None else xs, defined, **options), caption)]


def _row(figures: Sequence[Figure], caption: str = "") -> list[Block]:
    return [FigureRow(figures, caption=caption)] if figures else []


def _standard(label: str, curve: Curve) -> Line:
    """A mean curve brought to mean 0 and standard deviation 1 over layers; undefined where it does not vary."""
    values = np.array([e.value for e in curve])
    spread = values.std()
    shown = (values - values.mean()) / spread if spread > 0 else np.full(len(values), math.nan)
    return Line(label, _SERIES[label], shown.tolist())


def _finite(values: Sequence[float]) -> float:
    """The largest defined value, NaN where none is."""
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _flat(label: str, series: int, values: Sequence[float], *, dashed: bool = False) -> Line:
    return Line(label, series, list(values), dashed=dashed)


def _any(curve: Curve) -> bool:
    return any(math.isfinite(e.value) and e.value > 0 for e in curve)


def _maybe(estimate: Estimate | None) -> str:
    return "undefined" if estimate is None else interval(estimate)
