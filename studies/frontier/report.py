"""The frontier to look at: an ablation's tables and figures, divergence and time beside them, and who meets the aim."""

from __future__ import annotations

import math
from dataclasses import replace

from rich.table import Table as TerminalTable
from scipy.stats import spearmanr

from alula.evaluation import across_seeds
from alula.reports.document import Cell, Document, Section, Table
from alula.reports.experiment import dialogues
from alula.reports.summary import Summary
from alula.reports.wording import MISSING, bounds, listing, percent, points
from studies import arms
from studies.frontier.aim import AIMS, Judgement, divergence, judge, relative_time, right_later
from studies.frontier.arms import FRONTIER
from studies.frontier.record import FrontierOutcome

SHOWN = (
    "projector", "full", "full-tenth", "full-replay", "lora", "wings", "wings-best", "experts-seen", "experts-image",
    "experts-both", "experts-wide", "experts-turn", "experts-turn-wide", "full-distill", "lora-distill",
    "experts-seen-distill", "experts-both-distill",
)  # fmt: skip
"""arms of the figure that stands for all"""
SIZE = (780, 640)
"""of that figure: many arms lie within a few percent of each other"""
_AIM_COLUMNS = ("bare text: answers changed", "behind an image: kept", "visual skill against full tuning", "time")


def verdict(outcome: FrontierOutcome) -> list[str]:
    """Which arms meet the aim, what divergence says, then a sentence per question."""
    return [*aims(outcome), *_razor(outcome), *arms.verdict(FRONTIER, outcome)]


def aims(outcome: FrontierOutcome) -> list[str]:
    """A sentence per aim, and one about all of them together."""
    judged = judge(outcome)
    said = []
    for key, aim in AIMS.items():
        found = [each for each in judged if each.meets[key]]
        unknown = sum(each.meets[key] is None for each in judged)
        sentence = f"{_first_upper(aim)}: {listing([_name(outcome, each) for each in found]) if found else 'no arm'}"
        if key in judged[0].surely:
            sure = [_name(outcome, each) for each in found if each.surely[key]]
            sentence += f"; with the whole interval: {listing(sure) if sure else 'none'}"
        said.append(sentence + (f" ({unknown} not measured)." if unknown else "."))
    whole = [_name(outcome, each) for each in judged if all(each.meets.values())]
    said.append(f"All four by their estimates: {listing(whole) if whole else 'no arm'}.")
    return said


def table(outcome: FrontierOutcome) -> TerminalTable:
    """The arms as a table for the terminal."""
    return arms.table(FRONTIER, outcome, _more(outcome))


def markdown(outcome: FrontierOutcome) -> str:
    """Four tables for docs: the arms, the questions, the arms against the aim, and what they see."""
    lines = [f"| the aim | {' | '.join(_AIM_COLUMNS)} |", "|---|" + "---|" * len(_AIM_COLUMNS)]
    lines += [f"| {_name(outcome, each)} | {' | '.join(_judged(each))} |" for each in judge(outcome)]
    kinds = _kinds(outcome)
    lines += ["", f"| visual skill: right | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    lines += [f"| {method.label} | {' | '.join(_seen(kinds, name))} |" for name, method in outcome.methods.items()]
    own = "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")
    return f"{arms.markdown(FRONTIER, outcome, _more(outcome))}\n{own}\n"


def figures(outcome: FrontierOutcome) -> dict[str, str]:
    """Inline SVG by name; the first shows the arms that say most, of all groups."""
    summary = Summary(outcome)
    shown = [method for method in summary.methods if method.name in SHOWN]
    behind = next(column for column in FRONTIER.columns if column.task == "text_after_image")
    first = arms.tradeoff(FRONTIER, summary, shown, behind, SIZE)
    return {**({} if first is None else {"frontier": first}), **arms.figures(FRONTIER, outcome)}


def report(outcome: FrontierOutcome) -> Document:
    """The report as data."""
    document = arms.report(FRONTIER, outcome, _more(outcome))
    rows = [[Cell(_name(outcome, each)), *map(Cell, _judged(each))] for each in judge(outcome)]
    lead = [*aims(outcome), *_razor(outcome)]
    aim = Section("The aim", lead, [Table(["", *_AIM_COLUMNS], rows)])
    kinds = _kinds(outcome)
    seen = [[Cell(method.label), *map(Cell, _seen(kinds, name))] for name, method in outcome.methods.items()]
    sight = Section("What they see", ["Visual questions answered right, by kind."], [Table(["", *kinds], seen)])
    found = dialogues(Summary(outcome))
    return replace(document, sections=[aim, *document.sections, sight, *([found] if found else [])])


def _more(outcome: FrontierOutcome) -> dict[str, dict[str, str]]:
    nats = {name: divergence(outcome, name) for name in outcome.methods}
    later = {name: right_later(outcome, name) for name in outcome.methods}
    times = {name: relative_time(outcome, name) for name in outcome.methods}
    seen = {name: MISSING if math.isnan(share) else percent(share) for name, share in later.items()}
    return {
        **({"a turn later: right": seen} if outcome.later else {}),
        "KL(base, tuned)": {name: MISSING if math.isnan(nat) else f"{nat:.3f}" for name, nat in nats.items()},
        "time": {name: _times(value) for name, value in times.items()},
    }


def _kinds(outcome: FrontierOutcome) -> dict[str, dict[str, float]]:
    """Kind of visual question -> arm -> its accuracy, mean over trainings."""
    kinds: dict[str, dict[str, float]] = {}
    for name, method in outcome.methods.items():
        for kind, found in across_seeds(method.results("visual")).groups.items():
            kinds.setdefault(kind, {})[name] = found.tuned.mean.value
    return kinds


def _seen(kinds: dict[str, dict[str, float]], arm: str) -> list[str]:
    return [percent(found[arm]) for found in kinds.values()]


def _judged(each: Judgement) -> list[str]:
    def cell(key: str, text: str) -> str:
        met = each.meets[key]
        sure = each.surely.get(key, True)
        return text if met is None else f"{text}: {'no' if not met else 'yes' if sure else 'by the estimate'}"

    behind = MISSING if each.behind is None else f"{percent(each.behind.value)} ({bounds(each.behind)})"
    sight = MISSING if each.sight is None else f"{points(each.sight)} ({bounds(each.sight)})"
    return [
        cell("bare", str(each.changed)),
        cell("behind", behind),
        cell("sight", sight),
        cell("time", _times(each.time)),
    ]


def _razor(outcome: FrontierOutcome) -> list[str]:
    """Whether arms that went farther from the base on pictures kept less of its text."""
    judged = [(divergence(outcome, each.arm), each.behind) for each in judge(outcome)]
    pairs = [(nats, kept.value) for nats, kept in judged if kept is not None and not math.isnan(nats)]
    if len({nats for nats, _ in pairs}) < 3 or len({kept for _, kept in pairs}) < 3:
        return []
    rank = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return [
        f"Over {len(pairs)} arms, KL(base || tuned) on new visual questions and the text kept behind an image have a "
        f"rank correlation of {rank:+.2f} (arms are no random sample: no interval)."
    ]


def _name(outcome: FrontierOutcome, each: Judgement) -> str:
    return outcome.methods[each.arm].label


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


def _first_upper(text: str) -> str:
    return text[0].upper() + text[1:]
