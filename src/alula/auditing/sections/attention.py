"""Attention shift: do words behind an image get the attention they would have had?"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from alula.anatomy import Anatomy
from alula.auditing.drawing import SERIES, drawn_row, line, over_depth, varies
from alula.auditing.finding import Finding, Status, interval
from alula.auditing.record import Audit
from alula.auditing.sections.base import KEPT_BYTES, SUM_BYTES, WINGS_PAPER, Measurement, Section
from alula.auditing.sections.text import BARE, TextAnswers, less_likely, surely_lost
from alula.probes import AttentionShift, AttentionShiftResult
from alula.probes.attention import SEGMENTS
from alula.reports.document import Block, Cell, Table
from alula.reports.figures import Line
from alula.stats import Curve


def unrelated(layers: int) -> float:
    """The correlation that 95 % of unrelated curves over so many layers stay below in size (t test, two-sided)."""
    if layers < 3:
        return 1.0
    t = float(stats.t.ppf(0.975, layers - 2))
    return t / math.sqrt(layers - 2 + t * t)


def _layers(result: AttentionShiftResult) -> int:
    """How many decoder layers have attention: all but some of a hybrid's."""
    return len(result.curves["main"]["before"])


def _verdict(audit: Audit, measured: AttentionShiftResult) -> Finding | None:
    result = measured
    if result is None:
        return None
    title = "Does attention to text shift behind an image?"
    branch = "total" if "total" in result.shift else "main"
    shift, reach = result.shift[branch], unrelated(_layers(result))
    against = f"unrelated curves: {1 - reach:.2f} to {1 + reach:.2f}"
    figure = interval(shift)
    shown = f"attention shift {figure}"
    if not math.isfinite(shift.value):
        return Finding(
            "attention", title, Status.OPEN, shown, against,
            f"None of the {result.samples} samples has text on both sides of its images, so there is nothing to "
            "compare.", "Measure conversations with words before and after the image.",
        )  # fmt: skip
    low = shift.low if math.isfinite(shift.low) else shift.value
    high = shift.high if math.isfinite(shift.high) else shift.value
    learners = " (learners included)" if branch == "total" else ""
    if low > 1 + reach:
        status = Status.LOOK
        says = (
            f"Over the layers, attention to the text behind an image moves against attention to the text before it: "
            f"attention shift {figure}{learners}, beyond what unrelated curves give. In the Wings paper this is the "
            "mark of models that lost text skill."
        )
        do = _according_to_text(audit)
    elif high < 1 - reach:
        status = Status.FINE
        says = (
            f"Attention to the text behind an image rises and falls with attention to the text before it: attention "
            f"shift {figure}{learners}, clearly below what unrelated curves give."
        )
        do = "Nothing to do."
    else:
        status = Status.OPEN
        says = (
            f"Attention shift is {figure}{learners}. With {_layers(result)} layers, curves that have nothing to do "
            f"with each other give anything from {1 - reach:.2f} to {1 + reach:.2f}, so this decides nothing by itself."
        )
        do = "Compare it with the same figure of another checkpoint of this model, and trust the text answers more."
    return Finding("attention", title, status, shown, against, says, do)


def _according_to_text(audit: Audit) -> str:
    answers: TextAnswers | None = audit.results.get("text")
    pairs = answers.pairs if answers is not None else None
    if pairs is None:
        return "Check it where it counts: run the audit with --base and look at the text answers."
    text = pairs.tasks[BARE]
    if text.overall.retention is None and text.identical_answers < text.overall.n:
        less = less_likely(text)
        if less is None:
            return "The text answers above cannot tell: the base answers none of these questions. Ask others, or more."
        if less:
            return (
                "The text answers above agree, as far as they tell: their references are less likely than before. If "
                "they are worse, tune with Wings or replay text: docs/usage/training.md."
            )
    elif surely_lost(text.overall):
        return "The text answers above agree: words were lost. Tune with Wings or replay text: docs/usage/training.md."
    return "The text answers above do not show such a loss; keep an eye on questions that follow images."


def _blocks(audit: Audit, measured: AttentionShiftResult) -> list[Block]:
    result = measured
    assert result is not None
    figures = []
    for branch, curves in result.curves.items():
        shares = [line(s, SERIES[s], curve) for s, curve in curves.items() if varies(curve)]
        what = "decoder and learners together" if branch == "total" else "the decoder's own attention"
        figures += over_depth(
            shares, title=f"Share of attention by layer: {what}", x_title="decoder layer",
            y_title=f"share of attention, {what}", y_format=lambda v: f"{100 * v:.4g}%", least=0.02,
        )  # fmt: skip
    last = list(result.curves)[-1]
    sides = [_standard(side, result.curves[last][side]) for side in ("before", "after")]
    if all(any(math.isfinite(v) for v in line.values) for line in sides):
        what = "before and after, with the learners" if last == "total" else "before and after"
        figures += over_depth(
            sides, f"The mean curves {what}, each brought to mean 0: do they rise and fall together?",
            title="The two curves on one scale", x_title="decoder layer",
            y_title="attention to text, in standard deviations", least=1.0,
        )  # fmt: skip
    tables = [
        [Cell({"main": "decoder", "total": "with learners"}[branch]), Cell(interval(shift))]
        for branch, shift in result.shift.items()
    ]
    reach = unrelated(_layers(result))
    apart = f", {result.undefined} of them without text on one side of the image" if result.undefined else ""
    caption = (
        f"{result.samples} samples{apart}. Attention shift "
        "is 1 minus the correlation over layers of the curves before and after: 0 where they move together, 2 where "
        f"they move against each other. Null: curves that have nothing to do with each other lie between "
        f"{1 - reach:.2f} and {1 + reach:.2f} in 95 % of cases (t test over {_layers(result)} layers; neighbouring "
        "layers are alike, so the true range is wider)."
    )
    return [
        *drawn_row(figures, "Bands: 95 % bootstrap intervals over samples. All tokens ask, as in Eq. 1."),
        Table(["branch", "attention shift"], tables, caption),
    ]


def _standard(label: str, curve: Curve) -> Line:
    """A mean curve brought to mean 0 and standard deviation 1 over layers; undefined where it does not vary."""
    values = np.array([e.value for e in curve])
    spread = values.std()
    shown = (values - values.mean()) / spread if spread > 0 else np.full(len(values), math.nan)
    return Line(label, SERIES[label], shown.tolist())


def _bound(probe: AttentionShift, anatomy: Anatomy) -> int:
    heads = anatomy.num_heads if probe.heads == "each" else 1
    return 2 * len(anatomy.attended) * heads * len(SEGMENTS) * (probe.keep * KEPT_BYTES + SUM_BYTES)


ATTENTION = Section(
    name="attention",
    result=AttentionShiftResult,
    verdict=_verdict,
    blocks=_blocks,
    links=(WINGS_PAPER,),
    measurement=Measurement(AttentionShift, _bound),
)
