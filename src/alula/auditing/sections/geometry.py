"""Lengths, cones and sinks of image and text tokens over depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from alula.anatomy import Anatomy
from alula.auditing.drawing import SERIES, drawn_row, flat, line, over_depth
from alula.auditing.finding import Finding, Status, interval, number
from alula.auditing.record import Audit
from alula.auditing.sections.base import IMA_PAPER, KEPT_BYTES, SUM_BYTES, Measurement, Section, kinds_of
from alula.probes import Geometry, GeometryResult
from alula.probes.geometry import KindGeometry
from alula.reports.document import Block, Cell, Figure, FigureRow, Key, Table
from alula.reports.figures import cloud
from alula.reports.palette import NEUTRAL
from alula.stats import Estimate

LENGTH = 3.0
"""a factor between the lengths of image and text tokens that is worth a sentence"""


def length_ratio(first: Estimate, second: Estimate) -> Estimate:
    """First over second; the interval is the widest their intervals allow."""
    value = first.value / second.value if second.value else math.nan
    if not (math.isfinite(first.low) and math.isfinite(second.low) and second.low > 0):
        return Estimate(value)
    return Estimate(value, first.low / second.high, first.high / second.low)


def _turned(kinds: Mapping[str, KindGeometry], kind: str) -> str:
    """What the first block does to tokens of either kind, where the intervals tell them apart."""
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


def _verdict(audit: Audit, measured: GeometryResult) -> Finding | None:
    title = "Do images enter as tokens like any other?"
    kinds = measured.sites["stream"].kinds
    kind = next((name for name in kinds if name != "text"), None)
    if kind is None or "text" not in kinds:
        return None
    ratio = length_ratio(kinds[kind].norms["median"][0], kinds["text"].norms["median"][0])
    last = length_ratio(kinds[kind].norms["median"][-1], kinds["text"].norms["median"][-1])
    low = ratio.low if math.isfinite(ratio.low) else ratio.value
    high = ratio.high if math.isfinite(ratio.high) else ratio.value
    figure = f"{kind} tokens {interval(ratio, _digits(ratio.value))} times as long as text tokens on entry"
    against = f"same length: 1; {number(last.value, 1)} after the last block"
    site = measured.sites["stream"]
    middle = len(site.kinds[kind].within) // 2
    within, between = site.kinds[kind].within[middle], site.between[f"{kind}-text"][middle]
    cone = (
        f" Halfway up, {kind} tokens resemble each other ({number(within)}) more than text ({number(between)}): they "
        "keep a cone of their own."
        if within > between
        else f" Halfway up, {kind} tokens resemble text ({number(between)}) as much as each other ({number(within)})."
    )
    if low > LENGTH or high < 1 / LENGTH:
        longer = low > LENGTH
        status = Status.LOOK
        lengths = f"The {kind} tokens enter {interval(ratio, _digits(ratio.value))} times as long as words."
        says = f"{lengths}{_turned(kinds, kind)}{cone}"
        do = (
            "Nothing by itself: it is common where the connector ends without a norm. If training is unstable or the "
            f"model ignores {'text' if longer else 'images'}, put a norm behind the connector or scale its last layer."
        )
    else:
        status, do = Status.FINE, "Nothing to do."
        says = f"The {kind} tokens enter about as long as words: {interval(ratio, 2)} of their length.{cone}"
    return Finding("geometry", title, status, figure, against, says, do)


def _blocks(audit: Audit, measured: GeometryResult) -> list[Block]:
    site = measured.sites["stream"]
    kinds = {name: site.kinds[name] for name in ("text", *(k for k in site.kinds if k != "text")) if name in site.kinds}
    norms = over_depth(
        [line(name, SERIES[name], kind.norms["median"]) for name, kind in kinds.items()],
        "First tokens and sinks apart. Bands: 95 % bootstrap intervals over samples.",
        title="Length of tokens", x_title="state of the stream", y_title="median length of a token",
    )  # fmt: skip
    cones = over_depth(
        [
            *(flat(f"{name}-{name}", SERIES[name], kind.within) for name, kind in kinds.items()),
            *(flat(pair, NEUTRAL, values) for pair, values in site.between.items()),
        ],
        "Exact means over all pairs of samples; 0 for unrelated directions.",
        title="Narrow cones", x_title="state of the stream", y_title="cosine of different samples", least=0.1,
    )  # fmt: skip
    changes = [line(name, SERIES[name], kind.change[1]) for name, kind in kinds.items() if 1 in kind.change]
    changed = over_depth(
        changes, "1: the block leaves the token's direction as it is.", title="How much a block changes a token",
        x_title="decoder layer", y_title="cosine of a token before and after the block", least=0.05,
    )  # fmt: skip
    factor = f"{measured.settings['sink_factor']:g}"
    sinks = over_depth(
        [flat(name, SERIES[name], kind.sink_share) for name, kind in kinds.items()],
        f"Tokens more than {factor} times as long as the median of all tokens of their sample.",
        title="Sinks", x_title="state of the stream", y_title="tokens that are sinks",
        y_format=lambda v: f"{100 * v:.4g}%", least=0.01,
    )  # fmt: skip
    blocks: list[Block] = [*drawn_row([*norms, *cones, *changed, *sinks])]
    panels = [
        Figure(cloud(p.points, [SERIES[kind] for kind in p.kinds], title=f"state {p.state}"))
        for p in measured.projections
    ]
    if panels:
        keys = [Key(name, SERIES[name]) for name in kinds]
        blocks.append(
            FigureRow(
                panels, keys, "Each point: the mean of one sample's tokens of a kind, in the plane (PCA).", small=True
            )
        )
    rows = [
        [
            Cell(name, series=SERIES[name]),
            Cell(str(kind.samples)),
            Cell("none" if math.isnan(longest := _finite(kind.sink_norm)) else number(longest, 1)),
            Cell(number(max(kind.highest), 1)),
        ]
        for name, kind in kinds.items()
    ]
    blocks.append(
        Table(
            ["kind", "samples", "longest sinks, on average", "longest token"],
            rows,
            f"Over all states. First tokens, the usual sink: {number(max(site.first_norm), 1)} long on average at the "
            "state where they are longest.",
        )
    )
    return blocks


def _digits(ratio: float) -> int:
    """Decimals that show a ratio of lengths, which may be far below 1."""
    return 1 if ratio >= 1 or not ratio else 1 - math.floor(math.log10(ratio))


def _finite(values: Sequence[float]) -> float:
    """The largest defined value, NaN where none is."""
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _bound(probe: Geometry, anatomy: Anatomy) -> int:
    kinds, states, width = kinds_of(anatomy), anatomy.num_layers + 1, anatomy.hidden_size
    # norms (4) and change (1) per kind; sample means of four kinds of tokens at five states
    summaries = kinds * states * 8 * (probe.keep * KEPT_BYTES + SUM_BYTES)
    means = probe.keep * 4 * 5 * width * KEPT_BYTES
    return summaries + kinds * states * width * SUM_BYTES + means + kinds * states * 8 * SUM_BYTES


GEOMETRY = Section(
    name="geometry",
    result=GeometryResult,
    verdict=_verdict,
    blocks=_blocks,
    links=(IMA_PAPER,),
    measurement=Measurement(Geometry, _bound),
)
