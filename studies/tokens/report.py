"""The study of tokenizers to look at: a verdict and a table; all from the record."""

from __future__ import annotations

from rich.table import Table as TerminalTable

from alula.reports.document import Document
from alula.reports.wording import bounds, percent
from alula.stats import Estimate
from studies.grids import Grid, written
from studies.pages import to_repeat
from studies.tokens.record import TokensRecord

NAMES = {
    "tower-128": "k-means of the tower, 128",
    "tower-32": "k-means of the tower, 32",
    "untrained-128": "k-means of an untrained tower, 128",
    "vq-128": "VQ, 128",
    "vq-512": "VQ, 512",
    "two": "reads k-means of the tower, writes VQ, 128 each",
}
_CHANCE = 1 / 8


def grids(record: TokensRecord) -> list[Grid]:
    """Every table."""
    rows = [
        [
            NAMES[arm],
            _number(record.mean(arm, "read")),
            _share(record.likelier(arm)),
            _share(record.mean(arm, "drawn")),
            _share(record.mean(arm, "coded")),
            f"{record.mean(arm, 'pixels').value:.3f}",
            f"{record.mean(arm, 'pixels_coded').value:.3f}",
        ]
        for arm in record.arms
    ]
    columns = [
        "tokenizer",
        "nats a picture adds to its caption",
        "captions it makes likelier",
        "drawn picture found among eight",
        "true picture behind the tokenizer, likewise",
        "error of drawn pixels",
        "error behind the tokenizer",
    ]
    return [Grid("Reading and drawing", columns, rows)]


def table(record: TokensRecord) -> TerminalTable:
    """For the terminal."""
    return grids(record)[0].drawn()


def markdown(record: TokensRecord) -> str:
    """All tables for docs."""
    return written(grids(record), "**{}**")


def verdict(record: TokensRecord) -> list[str]:
    """What the study found, question by question."""
    arms = record.arms
    said = []
    for what, question in (("read", "Which tokenizer is read best?"), ("drawn", "Which is drawn best?")):
        best = max(arms, key=lambda arm: record.mean(arm, what).value)
        shown = _number(record.mean(best, what)) if what == "read" else _share(record.mean(best, what))
        said.append(f"{question} {NAMES[best]}: {shown}.")
    drawing = [NAMES[arm] for arm in arms if record.mean(arm, "drawn").low > _CHANCE]
    said.append(
        "Does a drawn picture show what was asked, by the fledgling's own tower? Oftener than chance (one in eight): "
        f"{'; '.join(drawing) or 'shown for none'}."
    )
    if {"tower-128", "untrained-128"} <= {*arms}:
        said.append(_against(record, "tower-128", "untrained-128", "Does it matter that the tower was trained?"))
    if {"two", "tower-128", "vq-128"} <= {*arms}:
        said.append(_against(record, "two", "vq-128", "Are two tokenizers better than one for both?"))
        said.append(_against(record, "two", "tower-128", "And against the other one for both?"))
    return said


def _against(record: TokensRecord, arm: str, other: str, question: str) -> str:
    read, drawn = (record.gain(arm, other, what) for what in ("read", "drawn"))
    return (
        f"{question} {NAMES[arm]} less {NAMES[other]}: reading {_number(read)} nats ({_sign(read)}), drawing "
        f"{_points(drawn)} ({_sign(drawn)})."
    )


def _sign(found: Estimate) -> str:
    if found.low > 0:
        return "more"
    return "less" if found.high < 0 else "no difference is shown"


def figures(record: TokensRecord) -> dict[str, str]:
    """Inline SVG by name: none, since tokenizers are in no order that a line could follow."""
    return {}


def report(record: TokensRecord) -> Document:
    """The report as data."""
    sections = [grid.section() for grid in grids(record)]
    repeated = to_repeat(
        record,
        record.seeds,
        ("training", f"{record.settings['training']} steps of every arm, a quarter of them of the projections alone"),
        ("captions", f"{record.settings['items']} that no training showed"),
    )
    return Document(
        title="Which codes can be read, and which can be drawn?",
        lead=verdict(record),
        sections=[*sections, repeated],
        footer=f"alula, {record.created}. Every number is worked out from the result file alone.",
    )


def _share(estimate: Estimate) -> str:
    return f"{percent(estimate.value)} ({bounds(estimate)})"


def _points(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} points ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _number(estimate: Estimate) -> str:
    return f"{estimate.value:+.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
