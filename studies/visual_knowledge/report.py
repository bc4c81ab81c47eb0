"""The study of visual knowledge to look at: a table of arms, comparisons with p values, a verdict; from the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from alula.reports.document import Block, Cell, Document, Facts, Figure, Section, Table
from alula.reports.figures import Point, scatter
from alula.reports.wording import MISSING, bounds, count, duration, listing, percent, points, probability
from alula.stats import holm
from alula_fledgling.microworld.named import SIGHT_FAMILIES
from studies.signs import SignTest
from studies.visual_knowledge.arms import ARMS, BEFORE
from studies.visual_knowledge.record import CHANCE, CHANCES, SEEN, KnowledgeRecord

TITLE = "Does stored sight help words?"
FAMILIES = (SEEN, *SIGHT_FAMILIES, "untold")
TITLES = {
    SEEN: "told by pictures, all",
    "colour": "colour",
    "shape": "shape",
    "company": "company",
    "comparison": "which is larger",
    "two_hop": "two hops",
    "untold": "told by nothing",
    "rule": "rules told in words",
}
MEMORY, CONTROL = "mks2", "told"


@dataclass(frozen=True)
class Comparison:
    """An arm against another, and what that is about."""

    asks: str
    arm: str
    against: str


COMPARISONS = (
    Comparison("MKS2 against the model before", MEMORY, BEFORE),
    Comparison("Storing first against learning all at once", MEMORY, "joint"),
    Comparison("Memory and mixture against LoRA on the MLP", MEMORY, "lora"),
    Comparison("Pictures with captions against captions alone", MEMORY, "blind"),
    Comparison("Captions and contrast against captions without it", MEMORY, "plain"),
    Comparison("Pairs that belong together against shuffled ones", MEMORY, "shuffled"),
    Comparison("MKS2 against full tuning", MEMORY, "full"),
    Comparison("MKS2 against Wings", MEMORY, "wings"),
    Comparison("Positive control: told in words against seen", CONTROL, MEMORY),
)


def chance(family: str) -> float:
    """Share right of who knows nothing."""
    if family == SEEN:
        return sum(map(chance, SIGHT_FAMILIES)) / len(SIGHT_FAMILIES)
    return CHANCES.get(family, CHANCE)


def label(arm: str) -> str:
    """An arm in words."""
    return "before" if arm == BEFORE else next(each.label for each in ARMS if each.name == arm)


def compared(record: KnowledgeRecord) -> list[tuple[Comparison, SignTest, float]]:
    """The comparisons whose arms were trained, over all that pictures tell, with p values corrected by Holm."""
    there = {BEFORE, *(arm.name for arm in record.arms)}
    chosen = [each for each in COMPARISONS if {each.arm, each.against} <= there]
    gains = [record.gain(each.arm, each.against, SEEN) for each in chosen]
    return list(zip(chosen, gains, holm([gain.p for gain in gains]), strict=True))


def head() -> list[str]:
    """Columns of the table of held things."""
    return ["", *(f"{TITLES[family]} (chance {percent(chance(family), 0)})" for family in FAMILIES)]


_BESIDE = [
    "", "tutored things", "pictures named", "captions find pictures", "memory's weight", "old text skills",
    "trained weights",
]  # fmt: skip


def rows(record: KnowledgeRecord) -> list[list[Cell]]:
    """Held things, by family."""
    return [
        [Cell(label(name)), *(_cell(record.accuracy(name, family), chance(family)) for family in FAMILIES)]
        for name in (BEFORE, *(arm.name for arm in record.arms))
    ]


def beside(record: KnowledgeRecord) -> list[list[Cell]]:
    """What else was measured: whether questions were learned, what was stored, what speaks, what was kept."""
    found = []
    for name in (BEFORE, *(arm.name for arm in record.arms)):
        weight = record.weight(name)
        cells = [
            _cell(record.accuracy(name, SEEN, "tutored"), None),
            _cell(record.named(name), None),
            _cell(record.found(name, "store"), None, bounded=False),
            Cell(MISSING if weight is None else percent(weight)),
            _cell(record.text(name), None),
            Cell(count(record.trained(name)) if name != BEFORE else MISSING),
        ]
        found.append([Cell(label(name)), *cells])
    return found


def _cell(found: SignTest | None, expected: float | None, *, bounded: bool = True) -> Cell:
    if found is None:
        return Cell(MISSING)
    is_told = expected is not None and (found.low > expected or found.high < expected)
    shade = None if expected is None else max(-1.0, min(1.0, (found.value - expected) / 0.5))
    return Cell(percent(found.value, 0), note=bounds(found) if bounded else "", strong=is_told, shade=shade)


def gains(record: KnowledgeRecord) -> list[list[Cell]]:
    """The comparisons, family by family, in points."""
    found = []
    for each, over_all, corrected in compared(record):
        tested = [over_all, *(record.gain(each.arm, each.against, family) for family in FAMILIES[1:])]
        tested.append(record.text_gain(each.arm, each.against))
        p = [Cell(f"{over_all.p:.2g}"), Cell(f"{corrected:.2g}")]
        found.append([Cell(each.asks), *map(_gain, tested), *p])
    return found


def _gain(gain: SignTest) -> Cell:
    said = points(gain)
    return Cell(said, note=bounds(gain), hint=probability(gain.p), strong=gain.p < 0.05, shade=gain.value / 0.5)


def verdict(record: KnowledgeRecord) -> list[str]:
    """What the study found, sentence by sentence."""
    found = control(record)
    there = [arm.name for arm in record.arms]
    for each, gain, corrected in compared(record):
        said = f"{points(gain)} points ({bounds(gain)}; {probability(gain.p)}, corrected {corrected:.2g})"
        what = "what only pictures told" if each.arm != CONTROL else "the same facts"
        found.append(f"{each.asks}, {what}: {said}{'' if corrected < 0.05 else '; no difference is shown'}.")
    lost = [
        f"{label(name)} {points(record.text_gain(name, BEFORE))} ({bounds(record.text_gain(name, BEFORE))})"
        for name in there
    ]
    untold = [name for name in there if record.accuracy(name, "untold").low > chance("untold")]
    found.append(f"Old text skills against before, in points: {listing(lost)}.")
    found.append(
        f"What nothing told is answered above chance by {listing([label(name) for name in untold])}."
        if untold
        else "What nothing told stays at chance in every arm."
    )
    return found


def control(record: KnowledgeRecord) -> list[str]:
    """What the positive control says of the test: nothing is decided of what it does not answer."""
    if CONTROL not in {arm.name for arm in record.arms}:
        return ["The positive control was not trained: what is not answered may not be answerable."]
    reached = [family for family in SIGHT_FAMILIES if record.accuracy(CONTROL, family).low > chance(family)]
    others = [family for family in SIGHT_FAMILIES if family not in reached]
    over_all = record.accuracy(CONTROL, SEEN)
    said = (
        f"Told in words, {percent(over_all.value, 0)} ({bounds(over_all)}) of the same are right, "
        f"{percent(chance(SEEN), 0)} by chance"
    )
    if not reached:
        return [f"{said}: the positive control fails, and nothing is decided."]
    beyond = f"; nothing is decided of {listing([TITLES[family] for family in others])}" if others else ""
    return [f"{said}: the test can be passed, in {listing([TITLES[family] for family in reached])}{beyond}."]


def table(record: KnowledgeRecord) -> TerminalTable:
    """The main table for a terminal, with all that pictures told in one column."""
    titles = ["", "told by pictures", "by nothing", "tutored", "named", "found", "weight", "old text", "trained"]
    made = TerminalTable(*titles, title=TITLE, box=SIMPLE_HEAD, title_justify="left")
    for asked, (_, *more) in zip(rows(record), beside(record), strict=True):
        made.add_row(*(cell.text for cell in (*asked[:2], asked[-1], *more)))
    return made


def markdown(record: KnowledgeRecord) -> str:
    """All tables for docs."""
    lines = [f"<!-- {record.command}; {record.created} -->"]
    for titles, body in ((head(), rows(record)), (_BESIDE, beside(record)), (_GAINS, gains(record))):
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for row in body:
            lines.append(f"| {' | '.join(f'{cell.text} ({cell.note})' if cell.note else cell.text for cell in row)} |")
        lines.append("")
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


_GAINS = ["in points", *(TITLES[family] for family in FAMILIES), "old text skills", "p, all", "p, Holm"]


def figures(record: KnowledgeRecord) -> Mapping[str, str]:
    """What was learned of sight against what was kept of text, as SVG by name."""
    dots = []
    for series, arm in enumerate(record.arms):
        dots.append(Point(arm.label, series, record.accuracy(arm.name, SEEN), record.text(arm.name)))
    reference = (record.text(BEFORE).value, "before")
    drawn = scatter(
        dots,
        title="Old text skills against questions that only pictures answer",
        x_title="right of what only pictures told, all families",
        y_title="old text skills",
        reference=reference,
        size=(760, 460),
    )
    return {"sight-and-text": drawn}


def report(record: KnowledgeRecord) -> Document:
    """One page."""
    asked: list[Block] = [
        Table(head(), rows(record), "Bold: the interval excludes chance."),
        Table(_BESIDE, beside(record), BESIDE),
    ]
    facts = [
        ("seeds", ", ".join(map(str, record.seeds))),
        ("held things", str(record.things)),
        ("took", duration(record.seconds)),
        *record.environment.items(),
    ]
    arms = Table(["arm", "what it is"], [[Cell(arm.label), Cell(arm.description)] for arm in record.arms], words=True)
    return Document(
        title=TITLE,
        lead=verdict(record),
        sections=[
            Section("Held things", READING, asked),
            Section("Arm against arm", GAINS, [Table(_GAINS, gains(record), "Bold: p below 0.05, uncorrected.")]),
            Section("Sight and text", [], [Figure(svg) for svg in figures(record).values()]),
            Section("The arms", [], [arms]),
            Section("To repeat it", [], [Facts(facts, record.command)]),
        ],
        footer=f"alula, {record.created}. Every figure is made of the result file alone.",
    )


BESIDE = (
    "Tutored: the same questions about tutored things. Named: pictures of which the name is said; found: captions that "
    "find their picture among those of all things (in mode store). Weight: the router's, of "
    "the memory, in questions."
)
READING = (
    "Named things are seen in pictures whose captions say the name and nothing of looks. Questions in words about "
    "half of them, the tutored ones, are taught with their answers; asked here are the others, by the likelihood "
    "of closed choices. Intervals (95 %) resample things, which share a training with the others of their world.",
)
GAINS = (
    "Share right of the first minus that of the second, thing by thing, in percentage points; p by flipping signs, "
    "of all that pictures told, as it is and corrected by Holm over the comparisons.",
)
