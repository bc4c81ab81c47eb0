"""The study of tokenizers to look at: a verdict and a table; all from the record."""

from __future__ import annotations

from rich.table import Table as TerminalTable

from alula.reports.document import Document
from alula.reports.wording import bounds, percent
from alula.stats import Estimate
from studies.grids import Grid, written
from studies.pages import to_repeat
from studies.tokens.plan import SOUNDS
from studies.tokens.record import TokensRecord

NAMES = {
    "vq-128": "VQ, 128",
    "vq-512": "VQ, 512",
    "placed-128": "VQ, 128 of each place",
    "vq-25": "VQ, 128, 25 codes a picture",
    "tower-128": "k-means of the tower, 128",
    "tower-32": "k-means of the tower, 32",
    "untrained-128": "k-means of an untrained tower, 128",
    "two": "reads k-means of the tower, 128, writes VQ, 128 of each place",
    "sound-256": "VQ of sounds, 256 of each place",
}
QUESTIONS = (
    ("tower-128", "untrained-128", "Does it matter that the tower was trained?"),
    ("two", "placed-128", "Are two tokenizers better than one for both?"),
    ("two", "tower-128", "And against the other one for both?"),
    ("placed-128", "vq-128", "Does it help that every place has codes of its own?"),
    ("vq-512", "vq-128", "Is a larger codebook better (VQ)?"),
    ("tower-128", "tower-32", "And of k-means?"),
    ("vq-128", "vq-25", "Are fewer codes a picture better?"),
)
_CHANCE = 1 / 8


def grids(record: TokensRecord) -> list[Grid]:
    """Every table."""
    pictures = [arm for arm in record.arms if arm not in SOUNDS]
    sounds = [arm for arm in record.arms if arm in SOUNDS]
    found = [
        Grid(
            "Reading and drawing",
            [*_columns("picture", "drawn"), "error of drawn pixels", "error behind the tokenizer"],
            [
                [*_cells(record, arm), *(f"{record.mean(arm, of).value:.3f}" for of in ("pixels", "pixels_coded"))]
                for arm in pictures
            ],
        ),
        Grid("Hearing and sounding", _columns("sound", "sounded"), [_cells(record, arm) for arm in sounds]),
    ]
    return [each for each in found if each.rows]


def _columns(kind: str, made: str) -> list[str]:
    return [
        "tokenizer",
        f"nats a {kind} adds to its caption",
        "captions it makes likelier",
        f"{made} {kind} found among eight",
        f"true {kind} behind the tokenizer, likewise",
    ]


def _cells(record: TokensRecord, arm: str) -> list[str]:
    return [
        NAMES[arm],
        _number(record.mean(arm, "read")),
        _share(record.likelier(arm)),
        _share(record.mean(arm, "drawn")),
        _share(record.mean(arm, "coded")),
    ]


def table(record: TokensRecord) -> TerminalTable:
    """For the terminal."""
    return grids(record)[0].drawn()


def markdown(record: TokensRecord) -> str:
    """All tables for docs."""
    return written(grids(record), "**{}**")


def verdict(record: TokensRecord) -> list[str]:
    """What the study found, question by question."""
    pictures = [arm for arm in record.arms if arm not in SOUNDS]
    said = []
    for what, question in (("read", "Which tokenizer is read best?"), ("drawn", "Which is drawn best?")):
        best = max(pictures, key=lambda arm: record.mean(arm, what).value)
        shown = _number(record.mean(best, what)) if what == "read" else _share(record.mean(best, what))
        said.append(f"{question} {NAMES[best]}: {shown}.")
    drawing = [NAMES[arm] for arm in record.arms if record.mean(arm, "drawn").low > _CHANCE]
    said.append(
        "Does what is drawn or sounded show what was asked, by the fledgling's own tower and ears? Oftener than chance "
        f"(one in eight): {'; '.join(drawing) or 'shown for none'}."
    )
    for arm, other, question in QUESTIONS:
        if {arm, other} <= {*pictures}:
            said.append(_against(record, arm, other, question))
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
        ("training", f"{record.settings['training']} steps of every arm, a tenth of them of the projections alone"),
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
