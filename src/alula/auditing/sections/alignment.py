"""Alignment of images with their own text, beside shuffled pairs and control passes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from alula.anatomy import Anatomy
from alula.auditing.drawing import SERIES, drawn_row, flat, line, or_undefined, over_depth
from alula.auditing.finding import Finding, Status, interval, number
from alula.auditing.record import Audit
from alula.auditing.sections.base import (
    CKA_PAPER,
    IMA_PAPER,
    KEPT_BYTES,
    SUM_BYTES,
    Measurement,
    Pass,
    Section,
    kinds_of,
)
from alula.errors import HostError
from alula.probes import Alignment, AlignmentResult, Resampling, noise_prompt, untrained_connector
from alula.probes.alignment import PairAlignment
from alula.reports.document import Block, Cell, Table
from alula.reports.palette import NEUTRAL
from alula.stats import Curve, Estimate

FEW = 20
"""below this number of samples, matched pairs are not judged"""


@dataclass(frozen=True)
class AlignmentMeasured:
    """Alignment of the model as it is, and under the controls "noise" (for images) and "untrained" (connector)."""

    result: AlignmentResult
    controls: Mapping[str, AlignmentResult] = field(default_factory=dict)


def beats_shuffling(pair: PairAlignment) -> tuple[int, int]:
    """In how many states matched pairs beat 95 % of shuffled ones (centred cosines), and of how many."""
    nulls = pair.sites["stream"].nulls["centred_matched"]
    return sum(null.p < 0.05 for null in nulls), len(nulls)


def main_pair(result: AlignmentResult) -> tuple[str, PairAlignment]:
    """The pair of kinds with most samples, and its name."""
    return max(result.pairs.items(), key=lambda item: item[1].samples)


def _verdict(audit: Audit, measured: AlignmentMeasured) -> Finding | None:
    title = "Do images lie near their own words?"
    name, pair = main_pair(measured.result)
    kind = name.split("-")[0]
    contrast = pair.contrast_score
    assert contrast is not None
    above, states = beats_shuffling(pair)
    figure = f"own minus other text {interval(contrast)}"
    held = [
        (control, found.pairs[name].contrast_score)
        for control, found in measured.controls.items()
        if name in found.pairs
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
        "what the connector delivers is nearer to its own words than to others'."
        if first.low > 0
        else "the blocks bring them together."
    )
    noise = next((value for control, value in held if control == "noise" and value is not None), None)
    if contrast.low <= 0:
        status = Status.ACT
        says = (
            f"The {kind} tokens are no nearer to their own text than to that of other samples: {interval(contrast)}, "
            f"above 95 % of shuffled pairs in {above} of {states} states.{entering if first.low > 0 else ''}"
        )
        do = (
            "Make sure that images reach the decoder (processor, placeholders, image token id). If they do, the "
            "connector has learned little: train it longer, on captions: docs/usage/training.md."
        )
    elif noise is None or not math.isfinite(noise.high):
        status = Status.OPEN
        says = (
            f"The {kind} tokens are nearer to their own text than to that of other samples: {interval(contrast)}. "
            "Whether that comes from what is seen cannot be said without the control: noise in place of the images can "
            "do the same, and so can a connector that was never trained."
        )
        do = "Measure it with controls (without --no-controls), under another --output."
    elif contrast.low <= noise.high:
        status = Status.LOOK
        says = (
            f"The {kind} tokens are nearer to their own text ({interval(contrast)}), but noise in their place does "
            f"nearly as well ({interval(noise)}): much of it does not come from what is seen."
        )
        do = "Train the connector longer, and repeat this with more samples."
    else:
        status = Status.FINE
        says = (
            f"The {kind} tokens are nearer to their own text than to that of other samples: {interval(contrast)}, "
            f"above 95 % of shuffled pairs in {above} of {states} states.{entering}"
        )
        do = "Nothing to do. The published score, below, cannot tell this: it averages over all pairs."
    return Finding("alignment", title, status, figure, against, says, do)


_CONTROLS = {"noise": "noise for images", "untrained": "untrained connector"}


def _blocks(audit: Audit, measured: AlignmentMeasured) -> list[Block]:
    name, pair = main_pair(measured.result)
    kind = name.split("-")[0]
    site = pair.sites["stream"]
    null = [(min(0.0, entry.mean), entry.high) for entry in site.nulls["centred_matched"]]
    own = [
        line("own text", SERIES[kind], site.centred_matched),
        line("others' text", NEUTRAL, site.centred_mismatched, dashed=True),
    ]
    for control, label, series in (("noise", "noise image", 5), ("untrained", "untrained", 3)):
        found = _of_pair(measured.controls.get(control), name)
        if found:
            own.append(line(label, series, found, dashed=True))
    matched = over_depth(
        own, "Grey: what 95 % of shuffled pairs stay below. Above it, images are near their own words.",
        title=f"{kind} tokens and text, common direction removed", x_title="state of the stream",
        y_title=f"cosine of {kind} tokens with text, common direction removed", null=null, least=0.05,
    )  # fmt: skip
    plain = over_depth(
        [
            line("own text", SERIES[kind], site.matched),
            line("others' text", NEUTRAL, site.mismatched, dashed=True),
        ],
        "With the common direction left in, the two are hard to tell apart.",
        title=f"{kind} tokens and text as they are", x_title="state of the stream",
        y_title=f"cosine of {kind} tokens with text, as they are", least=0.05,
    )  # fmt: skip
    raw = over_depth(
        [line("same state", SERIES["text"], site.all_pairs), line("tokens on entry", 4, site.input_prompt)],
        "Over all pairs, matched or not: how near the two kinds are as kinds.",
        title="The published alignment score by state", x_title="state of the stream",
        y_title="cosine over all pairs of samples (IMA score)", least=0.05,
    )  # fmt: skip
    debiased, knn = site.nulls["cka_debiased"], site.nulls["mutual_knn"]
    near = over_depth(
        [
            flat("debiased CKA", 2, site.cka_debiased),
            line("shared neighbours", 3, site.mutual_knn),
            flat("CKA, shuffled", 2, [entry.high for entry in debiased], dashed=True),
            flat("shared, shuffled", 3, [entry.high for entry in knn], dashed=True),
        ],
        "Dashed: what 95 % of shuffled pairs stay below.",
        title="Same structure on both sides", x_title="state of the stream", y_title="debiased CKA, shared neighbours",
        least=0.05,
    )  # fmt: skip
    rows = [
        [
            Cell("own minus other text"),
            Cell(or_undefined(pair.contrast_score)),
            *(Cell(or_undefined(_score(found, name))) for found in measured.controls.values()),
        ],
        [
            Cell("IMA score, same state"),
            Cell(or_undefined(pair.score)),
            *(Cell(or_undefined(_published(found, name))) for found in measured.controls.values()),
        ],
    ]
    headings = {"noise": "noise for images", "untrained": "untrained connector"}
    columns = ["mean over states", "this model", *(headings[control] for control in measured.controls)]
    caption = (
        f"{pair.samples} samples; intervals, neighbours ({pair.neighbours} each, chance "
        f"{number(pair.neighbours_chance)}) and nulls from {pair.kept} of them. State 0 is the decoder's input. Text: "
        "all of it behind the first image."
    )
    return [
        *drawn_row([*matched, *near, *plain, *raw], "Bands: 95 % bootstrap intervals over samples."),
        Table(columns, rows, caption),
    ]


def _of_pair(result: AlignmentResult | None, pair: str) -> Curve:
    return result.pairs[pair].sites["stream"].centred_matched if result is not None and pair in result.pairs else ()


def _score(result: AlignmentResult, pair: str) -> Estimate | None:
    return result.pairs[pair].contrast_score if pair in result.pairs else None


def _published(result: AlignmentResult, pair: str) -> Estimate | None:
    return result.pairs[pair].score if pair in result.pairs else None


def _bound(probe: Alignment, anatomy: Anatomy) -> int:
    states, width = anatomy.num_layers + 1, anatomy.hidden_size
    return (kinds_of(anatomy) - 1) * 2 * states * (width + 2) * (probe.keep * KEPT_BYTES + SUM_BYTES)


def _controls(model: Any, anatomy: Anatomy, seed: int) -> dict[str, Pass]:
    # noise by number of batch, so that a pass that was killed goes on with the noise it would have had
    first = seed * 1_000_003

    def noise(number: int) -> AbstractContextManager[Any]:
        return noise_prompt(model, seed=first + number)

    found = {"noise": Pass(around=noise)}
    if anatomy.projector is not None and _can_start_afresh(model):
        found["untrained"] = Pass(whole=lambda: untrained_connector(model, seed=seed))
    return found


def _can_start_afresh(model: Any) -> bool:
    try:
        with untrained_connector(model):
            return True
    except HostError:
        return False


def _result(probes: Mapping[str, Any], how: Resampling, model: Any, processor: Any) -> AlignmentMeasured:
    controls = {name: probe.result(how) for name, probe in probes.items() if name != "model"}
    return AlignmentMeasured(probes["model"].result(how), controls)


def _export(measured: AlignmentMeasured | None) -> dict[str, Any]:
    if measured is None:
        return {"alignment": None, "controls": {}}
    controls = {name: result.to_dict() for name, result in measured.controls.items()}
    return {"alignment": measured.result.to_dict(), "controls": controls}


ALIGNMENT = Section(
    name="alignment",
    result=AlignmentMeasured,
    verdict=_verdict,
    blocks=_blocks,
    links=(IMA_PAPER, CKA_PAPER),
    export=_export,
    measurement=Measurement(Alignment, _bound, result=_result, controls=_controls),
)
