"""The study of the universal encoder to look at: a verdict and tables; all from the record."""

from __future__ import annotations

from rich.table import Table as TerminalTable

from alula.reports.document import Document
from alula.stats import Estimate
from studies.grids import Grid, written
from studies.pages import to_repeat
from studies.universal.plan import ARMS, JOINT
from studies.universal.record import UniversalRecord

_WORDS = {
    "image": "pictures",
    "video": "films",
    "audio": "sounds",
    "points": "points",
    "depth": "depth",
    "normals": "normals",
    "motion": "motion",
    "response": "responses",
}

# the question, the arm that the paper prefers, the other, what it found
CLAIMS = (
    (
        "Joint or separate training?",
        JOINT,
        "separate",
        "joint, by 19.6 points on Clotho AQA and 25.8 on MSVD, and alike on pictures",
    ),
    ("Experts copied or from random weights?", JOINT, "random", "copied, by 17 CIDEr on NoCaps"),
    ("Three experts or one?", JOINT, "one", "three on pictures (4.7 points VQAv2), about alike on sounds"),
    ("Three experts or five?", JOINT, "five", "about alike"),
    ("A soft router or a constant one?", JOINT, "constant", "soft, by 3.9 points VQAv2"),
    ("A soft router or a sparse one?", JOINT, "sparse", "soft, by 0.5 points VQAv2"),
    ("The code's sigmoid or the paper's softmax?", JOINT, "softmax", "not asked"),
    ("A frozen or a tuned encoder?", JOINT, "tuned", "frozen, by 2.5 points VQAv2 (but not on sounds)"),
)


def grids(record: UniversalRecord) -> list[Grid]:
    """Every table."""
    arms = record.arms
    columns = ["arm", *(_WORDS[medium] for medium in record.media)]
    losses = [[ARMS[arm].label, *(_nats(record.loss(arm, medium)) for medium in record.media)] for arm in arms]
    seen = [[ARMS[arm].label, *(_nats(record.seen(arm, medium)) for medium in record.media)] for arm in arms]
    changes = [
        [ARMS[arm].label, *(_change(record.change(arm, JOINT, medium)) for medium in (*record.media, None))]
        for arm in arms
        if arm != JOINT
    ]
    return [
        Grid("Loss of held-out captions, nats per token", columns, losses),
        Grid("Against the joint arm, caption by caption", [*columns, "all"], changes),
        Grid("Lost behind another's item: what the model has of the item", columns, seen),
    ]


def table(record: UniversalRecord) -> TerminalTable:
    """Losses, for the terminal."""
    return grids(record)[0].drawn()


def markdown(record: UniversalRecord) -> str:
    """All tables for docs."""
    return written(grids(record), "**{}**")


def verdict(record: UniversalRecord) -> list[str]:
    """What of the paper holds, claim by claim; first, what is seen at all."""
    seen = ", ".join(f"{_WORDS[medium]} {_nats(record.seen(JOINT, medium))}" for medium in record.media)
    said = [
        "What does the joint arm have of the item? Told behind another's, captions lose so many nats per token more: "
        f"{seen}."
    ]
    for question, better, worse, paper in CLAIMS:
        if worse not in record.arms:
            continue
        loss, had = record.change(worse, better), record.seen_change(worse, better, "image")
        said.append(
            f"{question} Here, with {ARMS[worse].label}, captions of all media lose {_change(loss)} "
            f"({_sign(loss, -1)}), and of a picture there is had {_change(had)} ({_sign(had, 1)}). The paper: {paper}."
        )
    return said


def _sign(found: Estimate, good: int) -> str:
    """What a change against the joint arm means, where more (1) or less (-1) is good."""
    if found.low <= 0 <= found.high:
        return "no difference shown"
    return "better" if found.value * good > 0 else "worse"


def figures(record: UniversalRecord) -> dict[str, str]:
    """Inline SVG by name: none, since arms are in no order that a line could follow."""
    return {}


def report(record: UniversalRecord) -> Document:
    """The report as data."""
    sections = [grid.section() for grid in grids(record)]
    settings = record.settings
    repeated = to_repeat(
        record,
        record.seeds,
        ("training", f"{settings['images']} steps on pictures, then {settings['training']} of every arm"),
        ("captions", f"{settings['items']} held-out ones of each medium"),
    )
    return Document(
        title="One encoder for all media: what of OneLLM holds here?",
        lead=verdict(record),
        sections=[*sections, repeated],
        footer=f"alula, {record.created}. Every number is worked out from the result file alone.",
    )


def _nats(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def _change(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"
