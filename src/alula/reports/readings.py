"""What the figures say, in sentences made from the numbers; nothing here depends on a method's name."""

from __future__ import annotations

from alula.reports.summary import TEXT, Method, Summary
from alula.reports.wording import STARRED, bounds, listing, percent, probability

_CLEAR = 0.01
"""a difference of a percentage point is worth a sentence"""


def lead(summary: Summary) -> list[str]:
    """The report in two or three sentences."""
    outcome, said = summary.outcome, []
    if summary.text_tasks:
        task = summary.text_tasks[0]
        start = f"{outcome.base.label} answers {percent(summary.base_accuracy(task))} of the text questions."
        kept = [(method, summary.overall(method, task).retention) for method in summary.methods]
        shares = [(share.mean.value, method) for method, share in kept if share is not None]
        # of those that keep the same, the one that sees more comes first
        ranked = [method for _, method in sorted(shares, key=lambda pair: (-pair[0], -_sight(summary, pair[1])))]
        if len(ranked) > 1:
            best, worst = ranked[0], ranked[-1]
            said.append(
                f"{start} Tuned with {best.label} it keeps {_kept(summary, best, task)} of that"
                f"{_and_sees(summary, best)}; with {worst.label} it keeps {_kept(summary, worst, task)}"
                f"{_and_sees(summary, worst)}."
            )
        elif ranked:
            only = ranked[0]
            said.append(f"{start} {only.label} keeps {_kept(summary, only, task)} of that{_and_sees(summary, only)}.")
    asked = listing(
        [f"{summary.overall(summary.methods[0], task).n} ({title})" for task, title in outcome.tasks.items()]
    )
    seeds = len(outcome.seeds)
    trainings = f"{seeds} trainings per method; all" if seeds > 1 else "Both" if len(summary.methods) == 1 else "All"
    said.append(f"{trainings} models were asked the same questions in the same words: {asked}.")
    return said


def tradeoff(summary: Summary) -> list[str]:
    """Which methods no other one beats in both directions."""
    task, sight = summary.text_tasks[0], summary.visual_tasks[0]
    beaten = {
        method.label: [other.label for other in summary.methods if _beats(summary, other, method, task, sight)]
        for method in summary.methods
    }
    front = [label for label, by in beaten.items() if not by]
    said = []
    if 1 <= len(front) < len(beaten):
        said.append(
            f"By their means, nothing here is better than {listing(front)}: no other method is a point better in "
            "one and as good in the other."
        )
        said.append("Outdone: " + "; ".join(f"{label} (by {listing(by)})" for label, by in beaten.items() if by) + ".")
    return said


def intervals(summary: Summary) -> list[str]:
    """How to read the table."""
    seeds = len(summary.outcome.seeds)
    kept = "Kept: accuracy after tuning divided by the base's on the same items. " if summary.text_tasks else ""
    kept_of = [summary.overall(method, task) for method in summary.methods for task in summary.text_tasks]
    starred = any(part.exact for part in kept_of if part.retention is not None)
    star = [f"{STARRED}."] if starred else []
    if seeds > 1:
        return [
            f"{kept}Means over {seeds} trainings with 95 % intervals that carry the chance of the training and of the "
            "items (t interval, Satterthwaite's degrees of freedom).",
            *star,
        ]
    return [
        f"{kept}95 % intervals over items. One training says nothing about how another one would have turned out.",
        *star,
    ]


def families(summary: Summary) -> list[str]:
    """The hardest hit skill of every method, and identical answers."""
    task = summary.text_tasks[0]
    said = []
    for method in summary.methods:
        results = method.outcome.results(task)
        n, same = results[0].overall.n, [result.identical_answers for result in results]
        if all(value == n for value in same):
            said.append(f"{method.label}: all {n} answers to bare text are the base's, character for character.")
            continue
        groups = summary.result(method, task).groups
        hit = {name: part.difference.mean for name, part in groups.items()}
        worst = min(hit, key=lambda name: hit[name].value)
        sure = [name for name in groups if summary.beyond_chance(method, task, name)]
        if not summary.base_accuracy(task):
            said.append(f"{method.label}: the base answers none of these, so that no answer can be lost.")
            continue
        if len(groups) == 1:
            said.append(f"{method.label}: {100 * hit[worst].value:+.1f} points.")
            continue
        if hit[worst].value > -_CLEAR:
            said.append(f"{method.label}: no skill fell by a point or more.")
            continue
        line = f"{method.label}: hit hardest is {worst.replace('_', ' ')} ({100 * hit[worst].value:+.1f} points)"
        said.append(line + (f"; beyond chance: {listing([s.replace('_', ' ') for s in sure])}." if sure else "."))
    said.append(
        "Orange: lost, blue: gained. Bold: changed beyond chance in every training "
        "(exact McNemar test, Holm-corrected over the skills)."
    )
    return said


def sight(summary: Summary) -> list[str]:
    """Whether seeing carries over to what training never showed."""
    if len(summary.visual_tasks) < 2:
        return []
    known, new = summary.visual_tasks[:2]
    drops = [
        (summary.overall(m, new).tuned.mean.value - summary.overall(m, known).tuned.mean.value, m.label)
        for m in summary.methods
    ]
    least, most = max(drops), min(drops)
    if len(drops) == 1:
        return [f"From {summary.title(known)} to {summary.title(new)}: {100 * least[0]:+.1f} points."]
    return [
        f"From {summary.title(known)} to {summary.title(new)}: between {100 * least[0]:+.1f} points ({least[1]}) and "
        f"{100 * most[0]:+.1f} points ({most[1]})."
    ]


def dialogues(summary: Summary) -> list[str]:
    """Text turns in dialogues against the base."""
    task = summary.mixed_tasks[0]
    said, starred = [], False
    for method in summary.methods:
        part = summary.of_kind(method, task, TEXT)
        change = part.difference.mean
        interval = bounds(change, part.exact)
        said.append(f"{method.label}: text turns {100 * change.value:+.1f} points against the base ({interval}).")
        starred = starred or bool(part.exact)
    return [*said, f"{STARRED}."] if starred else said


def training(summary: Summary) -> list[str]:
    """What a curve does not show."""
    return ["Loss is on the training data of each method; a lower curve is not by itself a better model."]


def flips(summary: Summary) -> list[str]:
    """Whether the exchanges are more than chance, and where the examples come from."""
    seed = summary.outcome.seeds[0]
    task = (summary.text_tasks or list(summary.outcome.tasks))[0]
    said = []
    for method in summary.methods:
        results = method.outcome.results(task)
        parts = [
            f"{r.overall.lost} lost, {r.overall.gained} gained ({probability(r.overall.p_value)})" for r in results
        ]
        said.append(f"{method.label}: {'; '.join(parts)}.")
    several = f" The examples are of the training with seed {seed}." if len(summary.outcome.seeds) > 1 else ""
    return [
        "An average hides exchanges: a model can lose some items and gain as many others. Below are the items "
        f"themselves, with both answers.{several} For {summary.title(task)}, with exact McNemar tests"
        f"{' per training' if len(summary.outcome.seeds) > 1 else ''}:",
        *said,
    ]


def _kept(summary: Summary, method: Method, task: str) -> str:
    kept = summary.overall(method, task).retention
    return percent(kept.mean.value if kept else None)


def _and_sees(summary: Summary, method: Method) -> str:
    if not summary.visual_tasks:
        return ""
    return f" and answers {percent(_sight(summary, method))} of the visual questions"


def _sight(summary: Summary, method: Method) -> float:
    """Share of the visual questions that it answers right; 0 without any."""
    return summary.overall(method, summary.visual_tasks[0]).tuned.mean.value if summary.visual_tasks else 0.0


def _beats(summary: Summary, one: Method, other: Method, task: str, sight: str) -> bool:
    first, second = summary.overall(one, task).retention, summary.overall(other, task).retention
    if first is None or second is None:
        return False
    keeps = first.mean.value - second.mean.value
    sees = summary.overall(one, sight).tuned.mean.value - summary.overall(other, sight).tuned.mean.value
    return max(keeps, sees) >= _CLEAR and min(keeps, sees) >= -_CLEAR / 2
