"""What the figures say for this model and what to do about it: every sentence depends on intervals and nulls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from scipy import stats

from alula.auditing.record import Audit
from alula.auditing.text import BARE
from alula.evaluation import Comparison
from alula.evaluation.statistics import wilson
from alula.probes import AlignmentResult, OverlapResult
from alula.probes.alignment import PairAlignment
from alula.probes.geometry import KindGeometry
from alula.probes.results import Estimate
from alula.reports.wording import bounds, percent, probability

KEPT = 0.99
"""share of the base's text skill that counts as kept, as in the project's retention budget"""
LENGTH = 3.0
"""a factor between the lengths of image and text rows that is worth a sentence"""
COLLAPSED = 0.5
"""one word for half of all image rows is a collapse"""
FEW = 20
"""below so many samples, matched pairs are not judged"""


class Status(StrEnum):
    """How a section turned out; "open": the data does not decide."""

    FINE = "fine"
    LOOK = "look"
    ACT = "act"
    OPEN = "open"


@dataclass(frozen=True)
class Finding:
    """A section in a line.

    Attributes:
        section: of `alula.auditing.SECTIONS`.
        title: the section's question.
        status: fine, look, act or open.
        figure: the number it rests on, with its interval.
        against: what the number is held against: a null, a chance level, the base.
        says: what that means for this model.
        do: what to do about it.
    """

    section: str
    title: str
    status: Status
    figure: str
    against: str
    says: str
    do: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "status": str(self.status)}


def findings(audit: Audit) -> list[Finding]:
    """One finding per measured section, in the order of the report."""
    made = (_text(audit), _attention(audit), _alignment(audit), _geometry(audit), _lens(audit), _overlap(audit))
    return [finding for finding in made if finding is not None]


def number(value: float, digits: int = 2) -> str:
    """A number to so many decimals, or "undefined"."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "undefined"


def interval(estimate: Estimate, digits: int = 2) -> str:
    """``0.12 (0.08 to 0.16)``."""
    if not math.isfinite(estimate.low):
        return number(estimate.value, digits)
    return f"{number(estimate.value, digits)} ({number(estimate.low, digits)} to {number(estimate.high, digits)})"


# -- text -------------------------------------------------------------------------------------------------------------


def _text(audit: Audit) -> Finding | None:
    if audit.text is None:
        return None
    title = "Are the words still there?"
    after = audit.text.after_image
    hurt = after is not None and after.difference.high is not None and after.difference.high < 0
    extra = (
        f" An image before the question costs {100 * -after.difference.value:.1f} points more "
        f"({bounds(after.difference)})."
        if after is not None and hurt
        else " An image before the question costs nothing that can be measured here."
        if after is not None
        else ""
    )
    if audit.text.pairs is None:
        bare = audit.text.run.tasks[BARE]
        share = wilson(sum(item.score for item in bare.items), len(bare.items))
        return Finding(
            "text", title, Status.LOOK if hurt else Status.OPEN,
            f"{percent(share.value)} right ({bounds(share)})", "no base was given",
            f"It answers {percent(share.value)} of {len(bare.items)} text questions; how much of that tuning cost "
            f"cannot be said without the base.{extra}",
            "Name the model before tuning, or the LLM inside, with --base.",
        )  # fmt: skip
    whole = audit.text.pairs.tasks[BARE].overall
    kept = whole.retention
    if kept is None:
        return Finding(
            "text", title, Status.OPEN, "undefined", "the base answers none",
            f"The base answers none of the {whole.n} questions, so nothing can have been lost.",
            "Ask questions that the base can answer: --text FILE.",
        )  # fmt: skip
    figure = f"{percent(kept.value)} kept ({bounds(kept)})"
    against = (
        f"base {percent(whole.base.value)}; {whole.lost} lost, {whole.gained} gained, {probability(whole.p_value)}"
    )
    lost_surely = _surely_lost(whole)
    same = audit.text.pairs.tasks[BARE].identical_answers == whole.n
    low = _surely_kept(whole)
    if same or low >= KEPT:
        says = (
            f"It kept its words: all {whole.n} answers are the base's, character for character.{extra}"
            if same
            else f"It kept its words: at least {percent(low)} of what the base knows, with 95 % confidence.{extra}"
        )
        status, do = (Status.LOOK, _AFTER_IMAGE) if hurt else (Status.FINE, "Nothing to do.")
    elif lost_surely:
        says = (
            f"It lost words: {percent(kept.value)} of the base's text skill is left, and {whole.lost} lost against "
            f"{whole.gained} gained items is more than chance ({probability(whole.p_value)}).{extra}"
        )
        status = Status.ACT
        do = (
            "Read the lost items below for what they share. Then tune again with the LLM frozen (projector, Wings or "
            "LoRA), with a lower learning rate for the LLM, or with text replayed: docs/training.md."
        )
    else:
        says = (
            f"It lost nothing that {whole.n} questions can prove, but the interval reaches down to "
            f"{percent(low)}, which is less than the {percent(KEPT, 0)} that would count as kept.{extra}"
        )
        status, do = Status.OPEN, f"Ask more questions to decide: --items {4 * whole.n}."
    return Finding("text", title, status, figure, against, says, do)


def _surely_lost(whole: Comparison) -> bool:
    """More lost than chance gives: by McNemar's test, and by the bootstrap, which knows what belongs together."""
    high = whole.difference.high
    return whole.p_value < 0.05 and whole.lost > whole.gained and high is not None and high < 0


def _surely_kept(whole: Comparison) -> float:
    """The lower bound of retention. Where nothing was lost the bootstrap has nothing to vary, and the exact binomial
    bound of the share lost speaks instead (Clopper and Pearson 1934)."""
    assert whole.retention is not None
    if whole.lost or whole.retention.low is None:
        return whole.retention.low or 0.0
    right = round(whole.base.value * whole.n)
    return min(whole.retention.low, float(0.025 ** (1 / right)))


_AFTER_IMAGE = "Interleave text turns with images in tuning, or route by attention (Wings): docs/training.md."


# -- attention --------------------------------------------------------------------------------------------------------


def unrelated(layers: int) -> float:
    """The correlation that 95 % of unrelated curves over so many layers stay below in size (t test, two-sided)."""
    if layers < 3:
        return 1.0
    t = float(stats.t.ppf(0.975, layers - 2))
    return t / math.sqrt(layers - 2 + t * t)


def _attention(audit: Audit) -> Finding | None:
    result = audit.attention
    if result is None:
        return None
    title = "Does attention to text shift behind an image?"
    branch = "total" if "total" in result.shift else "main"
    shift, reach = result.shift[branch], unrelated(audit.layers)
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
            f"Attention shift is {figure}{learners}. With {audit.layers} layers, curves that have nothing to do with "
            f"each other give anything from {1 - reach:.2f} to {1 + reach:.2f}, so this decides nothing by itself."
        )
        do = "Compare it with the same figure of another checkpoint of this model, and trust the text answers more."
    return Finding("attention", title, status, shown, against, says, do)


def _according_to_text(audit: Audit) -> str:
    pairs = audit.text.pairs if audit.text is not None else None
    if pairs is None:
        return "Check it where it counts: run the audit with --base and look at the text answers."
    whole = pairs.tasks[BARE].overall
    if _surely_lost(whole):
        return "The text answers above agree: words were lost. Tune with Wings or with text replayed: docs/training.md."
    return "The text answers above do not show such a loss; keep an eye on questions that follow images."


# -- alignment --------------------------------------------------------------------------------------------------------


def beats_shuffling(pair: PairAlignment) -> tuple[int, int]:
    """In how many states matched pairs beat 95 % of shuffled ones (centred cosines), and of how many."""
    nulls = pair.sites["stream"].nulls["centred_matched"]
    return sum(null.p < 0.05 for null in nulls), len(nulls)


def main_pair(result: AlignmentResult) -> tuple[str, PairAlignment]:
    """The pair of kinds with most samples, and its name."""
    return max(result.pairs.items(), key=lambda item: item[1].samples)


def _alignment(audit: Audit) -> Finding | None:
    if audit.alignment is None:
        return None
    title = "Do images lie near their own words?"
    name, pair = main_pair(audit.alignment)
    kind = name.split("-")[0]
    contrast = pair.contrast_score
    assert contrast is not None
    above, states = beats_shuffling(pair)
    figure = f"own minus other text {interval(contrast)}"
    held = [
        (control, found.pairs[name].contrast_score) for control, found in audit.controls.items() if name in found.pairs
    ]
    against = f"shuffled pairs: beaten in {above} of {states} states" + "".join(
        f"; {_CONTROLS[control]} {interval(value)}" for control, value in held if value is not None
    )
    if pair.kept < FEW or not math.isfinite(contrast.low):
        return Finding(
            "alignment", title, Status.OPEN, figure, against,
            f"{pair.samples} samples are too few to tell a sample's own text from that of others.",
            f"Measure more: --samples {max(128, 2 * pair.samples)}.",
        )  # fmt: skip
    first = pair.sites["stream"].centred_contrast[0]
    entering = f" As they enter the decoder the figure is {interval(first)}: " + (
        "what the connector delivers is near its words already." if first.low > 0 else "the blocks bring them together."
    )
    noise = next((value for control, value in held if control == "noise" and value is not None), None)
    if contrast.low <= 0:
        status = Status.ACT
        says = (
            f"The {kind} rows are no nearer to their own text than to that of other samples: {interval(contrast)}, "
            f"above 95 % of shuffled pairs in {above} of {states} states.{entering if first.low > 0 else ''}"
        )
        do = (
            "Make sure that images reach the decoder (processor, placeholders, image token id). If they do, the "
            "connector has learned little: train it longer, on captions: docs/training.md."
        )
    elif noise is None or not math.isfinite(noise.high):
        status = Status.OPEN
        says = (
            f"The {kind} rows are nearer to their own text than to that of other samples: {interval(contrast)}. "
            "Whether that comes from what is seen cannot be said without the control: noise in place of the images can "
            "do the same, and so can a connector that was never trained."
        )
        do = "Measure it with controls (without --no-controls), under another --output."
    elif contrast.low <= noise.high:
        status = Status.LOOK
        says = (
            f"The {kind} rows are nearer to their own text ({interval(contrast)}), but noise in their place does "
            f"nearly as well ({interval(noise)}): much of it does not come from what is seen."
        )
        do = "Train the connector longer, and repeat this with more samples."
    else:
        status = Status.FINE
        says = (
            f"The {kind} rows are nearer to their own text than to that of other samples: {interval(contrast)}, above "
            f"95 % of shuffled pairs in {above} of {states} states.{entering}"
        )
        do = "Nothing to do. The published score, below, cannot tell this: it averages over all pairs."
    return Finding("alignment", title, status, figure, against, says, do)


_CONTROLS = {"noise": "noise for images", "untrained": "untrained connector"}


# -- geometry ---------------------------------------------------------------------------------------------------------


def length_ratio(first: Estimate, second: Estimate) -> Estimate:
    """First over second; the interval is the widest their intervals allow."""
    value = first.value / second.value if second.value else math.nan
    if not (math.isfinite(first.low) and math.isfinite(second.low) and second.low > 0):
        return Estimate(value)
    return Estimate(value, first.low / second.high, first.high / second.low)


def _turned(kinds: Mapping[str, KindGeometry], kind: str) -> str:
    """What the first block does to rows of either kind, where the intervals tell them apart."""
    own, text = (kinds[name].change.get(1, ())[:1] for name in (kind, "text"))
    if not (own and text):
        return ""
    a, b = own[0], text[0]
    if not (a.low > b.high or a.high < b.low):
        return ""
    return (
        f" The first block turns them {'less' if a.low > b.high else 'more'} than words (cosine with themselves "
        f"{number(a.value)} against {number(b.value)})."
    )


def _geometry(audit: Audit) -> Finding | None:
    if audit.geometry is None:
        return None
    title = "Do images enter as rows like any other?"
    kinds = audit.geometry.sites["stream"].kinds
    kind = next((name for name in kinds if name != "text"), None)
    if kind is None or "text" not in kinds:
        return None
    ratio = length_ratio(kinds[kind].norms["median"][0], kinds["text"].norms["median"][0])
    last = length_ratio(kinds[kind].norms["median"][-1], kinds["text"].norms["median"][-1])
    low = ratio.low if math.isfinite(ratio.low) else ratio.value
    high = ratio.high if math.isfinite(ratio.high) else ratio.value
    figure = f"{kind} rows {interval(ratio, 1)} times as long as text rows on entry"
    against = f"same length: 1; {number(last.value, 1)} after the last block"
    site = audit.geometry.sites["stream"]
    middle = len(site.kinds[kind].within) // 2
    within, between = site.kinds[kind].within[middle], site.between[f"{kind}-text"][middle]
    cone = (
        f" Halfway up, {kind} rows resemble each other ({number(within)}) more than text ({number(between)}): they "
        "keep a cone of their own."
        if within > between
        else f" Halfway up, {kind} rows resemble text ({number(between)}) as much as each other ({number(within)})."
    )
    if low > LENGTH or high < 1 / LENGTH:
        longer = low > LENGTH
        status = Status.LOOK
        lengths = f"The {kind} rows enter {interval(ratio, 1 if longer else 2)} times as long as words."
        says = f"{lengths}{_turned(kinds, kind)}{cone}"
        do = (
            "Nothing by itself: it is common where the connector ends without a norm. If training is unstable or the "
            f"model ignores {'text' if longer else 'images'}, put a norm behind the connector or scale its last layer."
        )
    else:
        status, do = Status.FINE, "Nothing to do."
        says = f"The {kind} rows enter about as long as words: {interval(ratio, 2)} of their length.{cone}"
    return Finding("geometry", title, status, figure, against, says, do)


# -- lens -------------------------------------------------------------------------------------------------------------


def word(audit: Audit, token: int) -> str:
    """A token as a reader sees it: spaces and line ends visible."""
    shown = repr(audit.words.get(token, f"#{token}"))[1:-1]
    return shown if shown.strip() else "\N{OPEN BOX}" * max(1, len(shown))


def _lens(audit: Audit) -> Finding | None:
    lens = audit.lens
    if lens is None:
        return None
    title = "Which words do image rows stand for?"
    kind = next((name for name in lens.kinds if name != "text"), None)
    if kind is None:
        return None
    top, entropy = lens.kinds[kind].top[-1], lens.kinds[kind].entropy
    if not top:
        return None
    token, share = top[0]
    uniform = math.log(lens.vocabulary)
    jensen = lens.divergence[f"{kind}||text"].jensen_shannon[-1] if f"{kind}||text" in lens.divergence else math.nan
    figure = f"{percent(share, 0)} of {kind} rows read {word(audit, token)!r} at the end"
    against = f"entropy {interval(entropy[-1], 1)} of {uniform:.1f} nats (no preference)"
    far = (
        f" As distributions over words, {kind} and text rows differ by {number(jensen)} at the end (0: alike, "
        f"{math.log(2):.2f}: nothing in common)."
        if math.isfinite(jensen)
        else ""
    )
    if share > COLLAPSED:
        status = Status.LOOK
        says = (
            f"Most {kind} rows read as one word at the end: {word(audit, token)!r} in {percent(share, 0)} of them.{far}"
        )
        do = (
            "Harmless where that word ends a line or an image (rows behind it still see the states below). If answers "
            "do not depend on the image either, look at the alignment above."
        )
    else:
        words = ", ".join(f"{word(audit, t)!r} {percent(s, 0)}" for t, s in top[:3])
        status = Status.FINE
        says = f"The {kind} rows read as different words; at the end most often {words}.{far}"
        do = "Read the table below: words that fit the image early on mean that it is understood early."
    return Finding("lens", title, status, figure, against, says, do)


# -- overlap ----------------------------------------------------------------------------------------------------------


def way_to_ceiling(result: OverlapResult, pair: str) -> list[float]:
    """Per layer, where the overlap lies between what shared magnitudes give (0) and what one stream has with itself on
    other samples (1); NaN where the two do not differ."""
    return [
        (layer.iou - layer.shared_magnitude) / (layer.ceiling - layer.shared_magnitude)
        if layer.ceiling > layer.shared_magnitude
        else math.nan
        for layer in result.pairs[pair].layers
    ]


def shared_use(result: OverlapResult, pair: str) -> Estimate:
    """The mean of `way_to_ceiling`, with the lowest and highest layer in place of an interval."""
    shares = [share for share in way_to_ceiling(result, pair) if math.isfinite(share)]
    if not shares:
        return Estimate(math.nan)
    return Estimate(float(np.mean(shares)), min(shares), max(shares))


def overlap_pair(result: OverlapResult) -> str | None:
    """The perceptual stream against text."""
    return next((pair for pair in result.pairs if pair.endswith("-text")), None)


def _overlap(audit: Audit) -> Finding | None:
    result = audit.overlap
    pair = None if result is None else overlap_pair(result)
    if result is None or pair is None:
        return None
    title = "Do images and words use the same weights?"
    kind = pair.split("-")[0]
    layers = result.pairs[pair].layers
    iou, null, ceiling, chance = (
        _mean([getattr(layer, name) for layer in layers]) for name in ("iou", "shared_magnitude", "ceiling", "chance")
    )
    share = shared_use(result, pair)
    figure = f"overlap {number(iou)}"
    against = f"chance {number(chance)}, shared magnitude {number(null)}, same kind {number(ceiling)}"
    if not math.isfinite(share.value):
        return Finding(
            "overlap", title, Status.OPEN, figure, against,
            "Too few samples to say how far two halves of the same data agree.", "Measure more samples.",
        )  # fmt: skip
    way = (
        f"of the overlap that one kind has with itself beyond shared weight size, they reach {percent(share.value, 0)} "
        f"(layers: {percent(share.low, 0)} to {percent(share.high, 0)})."
    )
    if share.low >= 0.5:
        status = Status.FINE
        says = f"The {kind} rows and the words rely on mostly the same weights: {way}"
        do = "Weights that matter to one matter to the other; pruning calibrated on one is not far off for the other."
    else:
        status = Status.LOOK
        says = (
            f"In {'some' if share.high >= 0.5 else 'all'} layers {kind} rows and words rely largely on different "
            f"weights: {way}"
        )
        do = "When pruning or quantising, calibrate on both kinds of rows; text alone would drop what images need."
    return Finding("overlap", title, status, figure, against, says, do)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan
