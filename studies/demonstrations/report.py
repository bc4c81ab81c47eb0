"""The study of demonstrations to look at: few-shot curves, what they cost, a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from alula.reports.document import Cell, Document, Facts, Figure, FigureRow, Section, Table
from alula.reports.figures.lines import Line, lines
from alula.reports.wording import duration
from studies.demonstrations.plan import WAYS
from studies.demonstrations.record import DemonstrationsRecord
from studies.examples import examples

LABELS = {"full": "full", "pruned": "pruned", "text": "words alone", "aim": "AIM"}
HEAD = ["shots", *(LABELS[way] for way in WAYS)]


def rows(record: DemonstrationsRecord, write: Callable[[str, int], str]) -> list[list[str]]:
    """A row per number of shots; a way that does not fit says so."""
    return [[str(shots), *(_said(record, way, shots, write) for way in WAYS)] for shots in record.shots]


def _said(record: DemonstrationsRecord, way: str, shots: int, write: Callable[[str, int], str]) -> str:
    return write(way, shots) if record.fits(way, shots) else "does not fit"


def tables(record: DemonstrationsRecord) -> dict[str, list[list[str]]]:
    """Accuracy, tokens, seconds and memory."""

    def right(way: str, shots: int) -> str:
        found = record.right(way, shots)
        return f"{100 * found.value:.0f} ({100 * max(found.low, 0):.0f} to {100 * min(found.high, 1):.0f})"

    def over_full(name: str) -> Callable[[str, int], str]:
        def write(way: str, shots: int) -> str:
            return f"{record.ratio(way, shots, name):.2f}" if record.fits("full", shots) else ""

        return write

    return {
        "right answers, %": rows(record, right),
        "tokens of a prompt": [
            [str(shots), *(f"{record.mean(way, shots, 'tokens'):.0f}" for way in WAYS)] for shots in record.shots
        ],
        "seconds over full": rows(record, over_full("seconds")),
        "peak memory over full": rows(record, over_full("peak")),
        "peak memory, MiB": rows(record, lambda way, shots: f"{record.mean(way, shots, 'peak') / 2**20:.1f}"),
    }


def verdict(record: DemonstrationsRecord) -> list[str]:
    """What the figures say, sentence by sentence."""

    def points(way: str, other: str, shots: int) -> str:
        found = record.lead(way, other, shots)
        sure = found.low > 0 or found.high < 0
        bounds = f"{100 * found.low:+.0f} to {100 * found.high:+.0f}"
        return f"{100 * found.value:+.0f} points ({bounds}{'' if sure else ', not told from 0'})"

    within, most = record.most_in_full, max(record.shots)
    none, full = record.right("full", 0), record.right("full", within)
    found = [
        f"Demonstrations help: {100 * none.value:.0f} % without, {100 * full.value:.0f} % behind {within} in full."
        if full.low > none.value
        else f"Demonstrations are not shown to help: {100 * none.value:.0f} % without, {100 * full.value:.0f} % "
        f"behind {within} in full.",
        f"AIM against words alone at {within} shots: {points('aim', 'text', within)}; against full demonstrations: "
        f"{points('aim', 'full', within)}; pruned against full: {points('pruned', 'full', within)}.",
        f"A prompt of {within} shots has {record.ratio('aim', within, 'tokens'):.2f} of the full one's tokens, takes "
        f"{record.ratio('aim', within, 'seconds'):.2f} of its processor time and "
        f"{record.ratio('aim', within, 'peak'):.2f} of its peak memory; to encode a demonstration once takes "
        f"{record.encoding:.2f} of a question without any.",
    ]
    if not record.fits("full", most) and record.fits("aim", most):
        aim = record.right("aim", most)
        found.append(
            f"{most} shots do not fit in full; with AIM they do, and {100 * aim.value:.0f} % are right, "
            f"{points('aim', 'text', most)} over words alone."
        )
    return found


def table(record: DemonstrationsRecord) -> TerminalTable:
    """Right answers for a terminal."""
    made = TerminalTable(*HEAD, box=SIMPLE_HEAD)
    for row in tables(record)["right answers, %"]:
        made.add_row(*row)
    return made


def markdown(record: DemonstrationsRecord) -> str:
    """All tables."""
    return (
        "\n\n".join(
            "\n".join(f"| {' | '.join(line)} |" for line in [[title, *HEAD[1:]], ["---"] * len(HEAD), *body])
            for title, body in tables(record).items()
        )
        + "\n"
    )


def figures(record: DemonstrationsRecord) -> Mapping[str, str]:
    """Curves over shots: right answers, and peak memory."""

    def curve(write: Callable[[str, int], float], bands: bool) -> list[Line]:
        return [
            Line(
                LABELS[way],
                number,
                [write(way, shots) if record.fits(way, shots) else float("nan") for shots in record.shots],
                [_band(record, way, shots) for shots in record.shots] if bands else (),
                dashed=way == "text",
            )
            for number, way in enumerate(WAYS)
        ]

    return {
        "right": lines(
            record.shots,
            curve(lambda way, shots: record.right(way, shots).value, True),
            title="Right answers by shots",
            x_title="shots",
            y_title="share of right answers",
        ),
        "memory": lines(
            record.shots,
            curve(lambda way, shots: record.mean(way, shots, "peak") / 2**20, False),
            title="Peak memory of one answer by shots",
            x_title="shots",
            y_title="MiB of tensors",
        ),
    }


def _band(record: DemonstrationsRecord, way: str, shots: int) -> tuple[float, float]:
    if not record.fits(way, shots):
        return float("nan"), float("nan")
    found = record.right(way, shots)
    return max(found.low, 0.0), min(found.high, 1.0)


def report(record: DemonstrationsRecord) -> Document:
    """One page."""
    drawn = figures(record)
    facts = [("seeds", ", ".join(map(str, record.seeds))), ("took", duration(record.seconds))]
    return Document(
        title="What is left of a demonstration without its picture?",
        lead=verdict(record),
        sections=[
            Section(
                "Few-shot curves",
                READING,
                [FigureRow([Figure(drawn["right"], CAPTIONS[0]), Figure(drawn["memory"], CAPTIONS[1])])],
            ),
            *(
                Section(title[0].upper() + title[1:], [], [Table(HEAD, [[Cell(text) for text in row] for row in body])])
                for title, body in tables(record).items()
            ),
            *_to_look_at(record),
            Section("To repeat it", [], [Facts(facts, record.command)]),
        ],
        footer=f"alula, {record.created}. Every figure is made of the result file alone.",
    )


def _to_look_at(record: DemonstrationsRecord) -> list[Section]:
    """Episodes with their answers, where the record has some."""
    if not record.shown:
        return []
    return [
        Section("To look at", ["Three shots, as they stand in full.", READ_AS], [examples(record.shown, LABELS)]),
    ]


READ_AS = "Words alone lack the pictures, AIM has fused tokens of the words that read them; the question is the same."
CAPTIONS = (
    "Right answers, with 95 % intervals over seeds and episodes. A curve ends where its prompts no longer fit.",
    "Tensors at the peak of one prompt and its answer, above those of the model.",
)
READING = (
    "Held-out episodes: pictures to be remembered that obey a rule (hearts are red, rings are blue), then: what colour "
    "is the heart? Only the pictures tell. Full: pictures and words. Pruned: each picture pooled to 5 of its 25 tokens "
    "by a policy. Words alone: the same turns without pictures. AIM: fused tokens in the place of words, no pictures.",
)
