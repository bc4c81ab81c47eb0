"""The study on real weights to look at: a verdict per claim, tables, two drawings; all from the record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table as TerminalTable

from alula.evaluation.results import Estimate
from alula.reports.document import Document, Figure, Section
from alula.reports.figures.scatter import Point, scatter
from alula.reports.wording import MISSING, listing
from studies.alignment.measure import OVERLAPS
from studies.alignment.record import AlignmentRecord
from studies.association import Association
from studies.grids import Grid, written
from studies.pages import to_repeat
from studies.real.pictures import NEGATIVES
from studies.real.plan import BASE
from studies.real.record import LOSSES, RealRecord, answered, ordered

TITLE = "Real weights, real pictures: what does each way cost in words?"
TEXT = ("blimp", "coda", "gsm8k", "formats")
"""the figures by which a way is said to cost words"""
SEEN = ("captions", "ordered", "had")
NAMES = {
    "blimp": "BLiMP",
    "coda": "CoDa",
    "coda_top": "CoDa, first colour",
    "gsm8k": "GSM8K",
    "formats": "chat formats",
    "followed": "formats followed",
    "ended": "turns ended",
    "captions": "captions",
    "cider": "CIDEr-D",
    "ordered": "what is there (order)",
    "answered": "what is there (said)",
    "yes": "said yes",
    "had": "what is had of the picture",
    "shapes": "easy-vqa",
    "shape_nats": "easy-vqa, nats",
}
_NUMBERS = (*LOSSES, "coda", "cider", "had")
_PREDICTORS = {
    "divergence": "KL(base, tuned) on the new task",
    "shift": "attention shift",
    "alignment": "alignment (IMA score)",
    "contrast": "matched contrast",
}
_OUTCOMES = {
    "gsm8k": "GSM8K lost",
    "blimp": "BLiMP lost",
    "captions": "captions told better",
    "shapes": "easy-vqa right",
}


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f})"


def _number(found: Estimate, digits: int = 2) -> str:
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _told(record: RealRecord, name: str, figure: str) -> str:
    found = record.figure(name, figure)
    return _number(found) if figure in _NUMBERS else _percent(found)


def _change(record: RealRecord, name: str, figure: str) -> str:
    if name == BASE:
        return MISSING
    found = record.change(name, figure)
    if figure in _NUMBERS:
        return f"{found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def direction(record: RealRecord, name: str, figure: str, against: str = BASE) -> int:
    """Against another model: 1 better, -1 worse with the whole interval, 0 not told apart."""
    found = record.change(name, figure, against)
    if found.low <= 0 <= found.high:
        return 0
    return int(math.copysign(1, found.value)) * (-1 if figure in LOSSES else 1)


def grids(record: RealRecord, beside: AlignmentRecord | None = None) -> list[Grid]:
    """Every table."""
    found = [
        Grid(
            "Words: right, or nats per token",
            ["", "BLiMP", "CoDa (Spearman)", "CoDa (first colour)", "GSM8K answers (nats)", "formats (nats)",
             "formats followed", "turns ended"],
            [
                [record.labels[name], *(_told(record, name, figure) for figure in
                 ("blimp", "coda", "coda_top", "gsm8k", "formats", "followed", "ended"))]
                for name in record.labels
            ],
        ),
        Grid(
            "Words: against the base, item by item (points, or as above)",
            ["", "BLiMP", "CoDa (Spearman)", "GSM8K answers (nats)", "GSM8K perplexity", "formats (nats)",
             "text is the base's, bit for bit"],
            [
                [record.labels[name], *(_change(record, name, figure) for figure in ("blimp", "coda", "gsm8k")),
                 f"x {math.exp(record.change(name, 'gsm8k').value):.2f}", _change(record, name, "formats"),
                 "yes" if record.unchanged(name) else "no"]
                for name in record.arms
            ],
        ),
        Grid(
            "Pictures of things no training showed",
            ["", "had of the picture (nats)", "captions (nats)", "CIDEr-D", "BLEU-4",
             "what is there: own thing the likelier", "said right", "said yes", "easy-vqa right"],
            [
                [record.labels[name], *(_told(record, name, figure) for figure in ("had", "captions", "cider")),
                 f"{record.mean(name, 'captions', 'bleu4'):.1f}",
                 *(_told(record, name, figure) for figure in ("ordered", "answered", "yes", "shapes"))]
                for name in record.labels
            ],
        ),
        Grid(
            "Is it there? by what is absent: own thing the likelier; said right",
            ["", *NEGATIVES],
            [
                [record.labels[name], *(
                    f"{_percent(record.kind(name, kind, ordered))}; {_percent(record.kind(name, kind, answered))}"
                    for kind in NEGATIVES)]
                for name in record.labels
            ],
        ),
        Grid(
            "BLiMP by phenomenon: base, then changes in points",
            ["", "base", *(record.labels[name] for name in record.arms)],
            [
                [of.replace("_", " "), f"{100 * record.phenomenon(BASE, of).value:.0f} %",
                 *(f"{100 * record.phenomenon(name, of, BASE).value:+.0f}" for name in record.arms)]
                for of in sorted(set(record.phenomena.values()))
            ],
        ),
        Grid(
            "How far from the base",
            ["", "KL(base, tuned), nats", "attention shift", "alignment", "matched contrast"],
            [
                [record.labels[name], *(f"{record.mean(name, each):.2f}" for each in
                 ("divergence", "shift", "alignment", "contrast"))]
                for name in record.labels
            ],
        ),
    ]  # fmt: skip
    if len(record.seeds) > 1:
        found.append(_by_seed(record))
    if record.predicted("gsm8k"):
        found.append(_predictions(record))
    if record.inside:
        found += [_inside(record, beside), _skipped(record)]
    return found


def _by_seed(record: RealRecord) -> Grid:
    """Changes against the base training by training, which says more of few seeds than an interval over them."""
    each = [record.of_seed(seed) for seed in record.seeds]

    def row(name: str) -> list[str]:
        changes = [
            (
                one.change(name, "blimp"),
                one.change(name, "coda"),
                one.change(name, "gsm8k"),
                one.change(name, "captions"),
            )
            for one in each
        ]
        return [
            record.labels[name],
            " / ".join(f"{100 * blimp.value:+.1f}" for blimp, *_ in changes),
            " / ".join(f"{coda.value:+.2f}" for _, coda, *_ in changes),
            " / ".join(f"x {math.exp(gsm8k.value):.2f}" for _, _, gsm8k, _ in changes),
            " / ".join(f"{captions.value:+.2f}" for *_, captions in changes),
            " / ".join(f"{one.figure(name, 'had').value:+.2f}" for one in each),
        ]

    return Grid(
        f"Training by training, against the base (seeds {' / '.join(record.seeds)})",
        ["", "BLiMP (points)", "CoDa", "GSM8K perplexity", "captions (nats)", "had of the picture (nats)"],
        [row(name) for name in record.arms],
    )


def _predictions(record: RealRecord) -> Grid:
    rows = []
    for outcome, name in _OUTCOMES.items():
        predicted = record.predicted(outcome)
        for predictor, title in _PREDICTORS.items():
            if predictor in predicted:
                each = predicted[predictor]
                rows.append([name, title, _correlation(each["end"]), _correlation(each["way"])])
    return Grid(
        f"What tells what: rank correlation over {len(record.runs)} trainings",
        ["", "told by", "at their end", "half-way and at their end"],
        rows,
    )


def _correlation(found: Association) -> str:
    rank = found.spearman
    if rank is None:
        return MISSING
    return (
        f"{rank.value:+.2f} ({rank.low:+.2f} to {rank.high:+.2f}), p {MISSING if rank.p is None else f'{rank.p:.2g}'}"
    )


def _curve(found: Mapping[str, Any], name: str) -> np.ndarray:
    return np.array(found["curves"][name], dtype=float)


def traits(found: Mapping[str, Any]) -> dict[str, float]:
    """What IMA and Wings say of models, as numbers of one model's curves."""
    gap = (_curve(found, "within_text") + _curve(found, "within_image")) / 2 - _curve(found, "between")
    overlap = {name: float(np.nanmean(_curve(found, name))) for name in OVERLAPS}

    def rise(what: str, site: str) -> float:
        inner, stream = _curve(found, f"{what}/{site}"), _curve(found, f"{what}/stream")
        return float(np.nanmean(inner - stream[: len(inner)]))

    return {
        "kinds apart, least over states": float(np.nanmin(gap)),
        "kinds apart, last state minus first": float(gap[-1] - gap[0]),
        "weights in common above chance": overlap["iou"] - overlap["chance"],
        "beyond what large weights explain": overlap["iou"] - overlap["shared_magnitude"],
        "below one kind on other samples": overlap["iou"] - overlap["ceiling"],
        "aligned by attention, as kinds": rise("aligned", "attention"),
        "aligned by attention, with its own text": rise("contrast", "attention"),
        "aligned by the MLP, as kinds": rise("aligned", "mlp"),
        "aligned by the MLP, with its own text": rise("contrast", "mlp"),
        "IMA score": float(found["figures"]["score"]),
        "IMA score of noise": float(found["figures"]["noise_score"]),
        "matched contrast": float(found["figures"]["contrast"]),
        "an image token beside itself a block later": float(np.nanmean(_curve(found, "change_image"))),
        "a text token beside itself a block later": float(np.nanmean(_curve(found, "change_text"))),
    }


def _inside(record: RealRecord, beside: AlignmentRecord | None) -> Grid:
    """Traits of models, means over seeds; the fledgling's are means over its study's trainings."""
    models = list(dict.fromkeys(name for found in record.inside.values() for name in found))
    columns: dict[str, list[dict[str, float]]] = {}
    if beside is not None:
        columns["fledgling, 6 layers"] = [
            traits(run.last.model_dump()) for run in beside.runs if run.configuration == "mlp"
        ]
    for name in models:
        columns[record.labels[name]] = [traits(found[name]) for found in record.inside.values() if name in found]
    names = list(next(iter(columns.values()))[0])
    rows = [
        [trait, *(f"{np.mean([each[trait] for each in found]):+.2f}" for found in columns.values())] for trait in names
    ]
    return Grid("Inside: what carried over", ["", *columns], rows)


def _skipped(record: RealRecord) -> Grid:
    rows = []
    for name in dict.fromkeys(name for found in record.inside.values() for name in found):
        every = [found[name]["skipped"] for found in record.inside.values() if name in found]
        cells = []
        for part in ("mlp", "attention", "block"):
            more = [np.subtract(each[part]["nats"], each["none"]["nats"]) for each in every]
            cells.append(f"{np.mean(more):+.2f}")
        rows.append([record.labels[name], f"{np.mean([each['none']['nats'] for each in every]):.2f}", *cells])
    layers = next(iter(next(iter(record.inside.values())).values()))["skipped"]["layers"]
    return Grid(
        f"Image tokens skip every second layer from {layers[0]} to {layers[-1]}: nats per token of answers, and more",
        ["", "none", "MLP", "attention", "block"],
        rows,
    )


def table(record: RealRecord) -> TerminalTable:
    """The table for the terminal."""
    rows = [
        [record.labels[name], *(_told(record, name, figure).partition(" (")[0] for figure in (*TEXT, *SEEN))]
        for name in record.labels
    ]
    return Grid(TITLE, ["", *(NAMES[figure] for figure in (*TEXT, *SEEN))], rows).drawn()


def markdown(record: RealRecord, beside: AlignmentRecord | None = None) -> str:
    """All tables for docs."""
    return written(grids(record, beside), "**{}**")


def verdict(record: RealRecord) -> list[str]:
    """What each way costs and gains, sentence by sentence."""
    said = []
    for name in record.arms:
        cost = [NAMES[figure] for figure in TEXT if direction(record, name, figure) < 0]
        won = [NAMES[figure] for figure in TEXT if direction(record, name, figure) > 0]
        seen = [NAMES[figure] for figure in SEEN if direction(record, name, figure) > 0]
        words = (
            "text is the base's, bit for bit"
            if record.unchanged(name)
            else (
                f"costs {listing(cost) if cost else 'no words that are told from none'}"
                + (f", gains {listing(won)}" if won else "")
            )
        )
        said.append(
            f"{_first_upper(record.labels[name])}: {words}; about pictures "
            f"{'better in ' + listing(seen) if seen else 'nothing is told from the base'}."
        )
    if "full" in record.arms:
        for name in record.arms:
            if name != "full":
                text, sight = ([f for f in which if direction(record, name, f, "full") > 0] for which in (TEXT, SEEN))
                lost = [f for f in SEEN if direction(record, name, f, "full") < 0]
                said.append(
                    f"{_first_upper(record.labels[name])} against full tuning: keeps more of {_named(text)}; better "
                    f"in {_named(sight)}, less in {_named(lost)}."
                )
    return [*said, _sight_said(record), *_prediction_said(record)]


def _sight_said(record: RealRecord) -> str:
    """Whether anything is seen: what answers have of their own picture, and shapes beside a blind guess."""
    shares = {name: record.figure(name, "had") for name in record.labels}
    seeing = [record.labels[name] for name, found in shares.items() if found.low > 0]
    guess = Estimate(*[sum(map(int, record.blind)) / len(record.blind)] * 3)
    above = [record.labels[name] for name in record.arms if record.figure(name, "shapes").low > guess.value]
    return (
        f"Answers and captions are likelier behind their own picture than behind another in: "
        f"{listing(seeing) if seeing else 'none'}. Of easy-vqa {100 * guess.value:.0f} % are right without a look, by "
        f"the most frequent answer; above that: {listing(above) if above else 'none'}."
    )


def _prediction_said(record: RealRecord) -> list[str]:
    said = []
    for outcome in ("gsm8k", "captions"):
        predicted = record.predicted(outcome)
        told = [
            f"{_PREDICTORS[name]} {each['end'].spearman.value:+.2f} at the end, "
            f"{each['way'].spearman.value:+.2f} with half-way"
            for name, each in predicted.items()
            if each["end"].spearman is not None and each["way"].spearman is not None
        ]
        if told:
            said.append(f"{_OUTCOMES[outcome]}, rank correlation over {len(record.runs)} trainings: {'; '.join(told)}.")
    return said


def _named(figures: list[str]) -> str:
    return listing([NAMES[figure] for figure in figures]) if figures else "nothing"


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _likelihood(record: RealRecord, name: str, figure: str) -> Estimate:
    """exp(loss of the base - loss): what a token's likelihood is beside the base's, as retention says."""
    change = record.change(name, figure)
    return Estimate(math.exp(-change.value), math.exp(-change.high), math.exp(-change.low))


def figures(record: RealRecord) -> dict[str, str]:
    """Words against sight, as SVG by name."""
    arms = list(enumerate(record.arms))
    seen = {name: _likelihood(record, name, "captions") for name in record.arms}
    return {
        "words-and-captions": scatter(
            [Point(record.labels[name], place, seen[name], _likelihood(record, name, "gsm8k")) for place, name in arms],
            title="Likelihood of worked answers (GSM8K) kept, against that of captions of held-out pictures",
            x_title="likelihood per token of captions of held-out pictures, the base's = 100 %",
            y_title="likelihood per token of GSM8K's answers, the base's = 100 %",
            reference=(1.0, "base"),
            size=(780, 520),
        ),
        "grammar-and-captions": scatter(
            [Point(record.labels[name], place, seen[name], record.figure(name, "blimp")) for place, name in arms],
            title="Grammar (BLiMP), against the likelihood of captions of held-out pictures",
            x_title="likelihood per token of captions of held-out pictures, the base's = 100 %",
            y_title="BLiMP, right",
            reference=(record.figure(BASE, "blimp").value, "base"),
            size=(780, 520),
        ),
    }


def report(record: RealRecord, beside: AlignmentRecord | None = None) -> Document:
    """The report as data."""
    settings = record.settings
    repeated = to_repeat(
        record,
        [int(seed) for seed in record.seeds],
        ("models", f"{settings['llm']}, {settings['tower']}"),
        ("training", f"{settings['align']} steps of the connector, then {settings['training']} of every way, "
                     f"{settings['batch']} samples each, {settings['precision']}"),
    )  # fmt: skip
    drawn = Section("Words and sight", blocks=[Figure(svg) for svg in figures(record).values()])
    return Document(
        title=TITLE,
        lead=verdict(record),
        sections=[drawn, *(grid.section() for grid in grids(record, beside)), repeated],
        footer=f"alula, {record.created}. Every number is worked out from the result file alone.",
    )
