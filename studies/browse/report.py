"""The study of browsing to look at: a verdict and tables; all from the record."""

from __future__ import annotations

from rich.table import Table as TerminalTable

from alula.reports.document import Document, Examples, Section
from alula.reports.wording import bounds, percent, points
from alula.stats import Estimate
from studies.browse.plan import ARMS, TASKS
from studies.browse.record import BrowseRecord
from studies.examples import Shown, examples
from studies.grids import Grid, written
from studies.pages import to_repeat

_ARMS = {"plain": "without browsing", "browse": "browsing", "staged": "in two stages"}
_TOLD = {"own": "its own condition", "none": "none", "others": "another's"}
_ASKED = {
    "pictures": "several pictures", "visual": "one picture", "pictures: change": "what changed",
    "pictures: which": "which of four shows it", "pictures: total": "how many in all",
    "pictures: later": "what the words behind them ask",
}  # fmt: skip


def grids(record: BrowseRecord) -> list[Grid]:
    """Every table."""
    groups = _groups(record)
    trained, told = [*ARMS], [(arm, name) for arm in ARMS[1:] for name in _TOLD if name != "own"]
    right = [[_ASKED[group], *(_share(record.share(arm, "own", group)) for arm in trained)] for group in groups]
    gained = [[_ASKED[group], *(_points(record.gain(arm, "own", group)) for arm in trained[1:])] for group in groups]
    lost = [
        [_ASKED[group], *(_points(record.gain(arm, name, group, over=(arm, "own"))) for arm, name in told)]
        for group in groups
    ]
    return [
        Grid("Right answers", ["asked about", *(_ARMS[arm] for arm in trained)], right),
        Grid(
            "Against the same training without browsing, question by question",
            ["asked about", *(_ARMS[arm] for arm in trained[1:])],
            gained,
        ),
        Grid(
            "Told another condition at test, against its own",
            ["asked about", *(f"{_ARMS[arm]}: {_TOLD[name]}" for arm, name in told)],
            lost,
        ),
    ]


def table(record: BrowseRecord) -> TerminalTable:
    """Right answers, for the terminal."""
    return grids(record)[0].drawn()


def markdown(record: BrowseRecord) -> str:
    """All tables for docs."""
    return written(grids(record), "**{}**")


def verdict(record: BrowseRecord) -> list[str]:
    """What the study found, question by question."""
    controls = [_control(record)] if record.seeds[next(iter(record.seeds))]["staged"].captions else []
    return [_helps(record), _told(record), *controls, _keeps(record)]


def _helps(record: BrowseRecord) -> str:
    said = []
    for arm in ARMS[1:]:
        found = record.gain(arm, "own", "pictures")
        said.append(f"{_ARMS[arm]} {_sign(found)} ({_points(found)})")
    plain = _share(record.share("plain", "own", "pictures"))
    return (
        f"Does it help where one picture cannot answer? The same training without it answers {plain} right; "
        f"{'; '.join(said)}."
    )


def _told(record: BrowseRecord) -> str:
    said = []
    for arm in ARMS[1:]:
        each = [
            f"{_TOLD[name]} {_points(record.gain(arm, name, 'pictures', over=(arm, 'own')))}"
            for name in ("none", "others")
        ]
        said.append(f"{_ARMS[arm]}: {' and '.join(each)}")
    sizes = " and ".join(percent(record.moved(arm)) for arm in ARMS[1:])
    return (
        f"Does the answer depend on what the connector is told? Told otherwise at test, {'; '.join(said)}. The "
        f"condition moves image tokens by {sizes} of their size."
    )


def _control(record: BrowseRecord) -> str:
    """Whether the map learnt anything: what it is told is all that says what a caption is to tell."""
    none, others = record.costs("none"), record.costs("others")

    def nats(found: Estimate) -> str:
        return f"{found.value:+.3f} nats per token ({found.low:.3f} to {found.high:.3f})"

    held = record.held.values()
    return (
        "Was the map trained? Behind the first stage captions of what matters to a question cost "
        f"{record.captions:.3f} nats per token; told nothing {nats(none)}; told a condition of another question of the "
        f"kind {nats(others)}. Of the colours that questions ask for a linear map reads "
        f"{percent(sum(held) / len(held))} off the conditions."
    )


def _keeps(record: BrowseRecord) -> str:
    said = [f"{_ARMS[arm]} {_points(record.gain(arm, 'own', 'visual'))}" for arm in ARMS[1:]]
    return f"What of questions about one picture? Against the same training without it, {'; '.join(said)}."


def _sign(found: Estimate) -> str:
    if found.low > 0:
        return "answers more"
    return "answers fewer" if found.high < 0 else "shows no difference"


def figures(record: BrowseRecord) -> dict[str, str]:
    """Inline SVG by name: none, since kinds of questions are in no order that a line could follow."""
    return {}


def report(record: BrowseRecord) -> Document:
    """The report as data."""
    sections = [grid.section() for grid in grids(record)]
    shown = _examples(record)
    if shown.examples:
        sections.append(Section("To look at", ["One question of each kind, as the first seed answered it."], [shown]))
    repeated = to_repeat(
        record,
        record.seeds,
        ("training", f"{record.settings['training']} steps of every arm"),
        ("questions", f"{record.settings['items']} about several pictures, a quarter as many about one"),
    )
    return Document(
        title="Does reading everything once help to look?",
        lead=verdict(record),
        sections=[*sections, repeated],
        footer=f"alula, {record.created}. Every number is worked out from the result file alone.",
    )


def _examples(record: BrowseRecord) -> Examples:
    """Questions with the answers of every arm, of the first seed."""
    arms = record.seeds[next(iter(record.seeds))]
    merged = [
        Shown(
            family=f"pictures: {plain.family}",
            prompt=plain.prompt,
            gold=plain.gold,
            answers={arm: asked.shown[place].answers["own"] for arm, asked in arms.items()},
        )
        for place, plain in enumerate(arms["plain"].shown)
    ]
    return examples(merged, _ARMS, _ASKED)


def _groups(record: BrowseRecord) -> list[str]:
    return [*TASKS, *(family for family in record.families if family.startswith("pictures:"))]


def _share(estimate: Estimate) -> str:
    return f"{percent(estimate.value)} ({bounds(estimate)})"


def _points(estimate: Estimate) -> str:
    return f"{points(estimate)} points ({bounds(estimate)})"
