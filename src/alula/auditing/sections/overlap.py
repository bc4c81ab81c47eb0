"""Whether images and words rely on the same weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alula.anatomy import Anatomy
from alula.auditing.drawing import SERIES, drawn_row, flat, over_depth
from alula.auditing.finding import Finding, Status, number
from alula.auditing.record import Audit
from alula.auditing.sections.base import IMA_PAPER, SUM_BYTES, WANDA_PAPER, Measurement, Section
from alula.probes import Overlap, OverlapResult, Resampling
from alula.reports.document import Block, Cell, Table
from alula.reports.palette import NEUTRAL
from alula.reports.wording import percent
from alula.stats import Estimate
from alula.weights import linears


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


def _verdict(audit: Audit, measured: OverlapResult) -> Finding | None:
    result = measured
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
        says = f"The {kind} tokens and the words rely on mostly the same weights: {way}"
        do = "Weights that matter to one matter to the other; pruning calibrated on one is not far off for the other."
    else:
        status = Status.LOOK
        says = (
            f"In {'some' if share.high >= 0.5 else 'all'} layers {kind} tokens and words rely largely on different "
            f"weights: {way}"
        )
        do = "When pruning or quantising, calibrate on both kinds of tokens; text alone would drop what images need."
    return Finding("overlap", title, status, figure, against, says, do)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def _blocks(audit: Audit, measured: OverlapResult) -> list[Block]:
    result = measured
    assert result is not None
    pair = overlap_pair(result)
    assert pair is not None
    found = result.pairs[pair]
    kind = pair.split("-")[0]
    drawn = [
        flat(f"{kind} and text", SERIES[kind], [layer.iou for layer in found.layers]),
        flat("same kind", 2, [layer.ceiling for layer in found.layers], dashed=True),
        flat("shared size", NEUTRAL, [layer.shared_magnitude for layer in found.layers], dashed=True),
        flat("chance", 5, [layer.chance for layer in found.layers], dashed=True),
    ]
    weights = over_depth(
        drawn,
        f"The {percent(1 - result.sparsity, 0)} of each row's weights with the highest |weight| times activation, over "
        "tokens of either kind. Same kind: one kind on two halves of the samples, the most one can expect. Shared "
        "size: what remains when channels are shuffled (null).",
        title="Overlap of the weights that matter", x_title="decoder layer",
        y_title="kept by both over kept by either", least=0.1,
    )  # fmt: skip
    beyond = over_depth(
        [
            flat("of the way", SERIES[kind], way_to_ceiling(result, pair)),
            flat("beyond size", 3, [layer.beyond_magnitude for layer in found.layers]),
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
        *drawn_row([*weights, *beyond]),
        Table(
            ["", *(name.split(".")[-1] for name in matrices)],
            rows,
            "By matrix: overlap, darker where it is nearer to what one kind has with itself.",
            heat=True,
        ),
    ]


def _bound(probe: Overlap, anatomy: Anatomy) -> int:
    widths = sum(matrix.in_features for layer in anatomy.layers for _, matrix in linears(layer))
    return len(probe.streams) * 2 * widths * SUM_BYTES


def _result(probes: Mapping[str, Any], how: Resampling, model: Any, processor: Any) -> OverlapResult:
    # masks are made from the weights, which a probe read from a file does not know
    result: OverlapResult = probes["model"].result(how, model=model)
    return result


OVERLAP = Section(
    name="overlap",
    result=OverlapResult,
    verdict=_verdict,
    blocks=_blocks,
    links=(WANDA_PAPER, IMA_PAPER),
    measurement=Measurement(Overlap, _bound, result=_result),
)
