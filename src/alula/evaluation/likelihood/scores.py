"""What likelihoods of options come to: scores, and beside every score what an answer habit alone would have got.

A tie is no answer: an option counts as said only where it is likelier than every other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from alula.evaluation.likelihood.questions import Question, Shape
from alula.evaluation.results import Ratio

TOPIC = "Answer habits and calibration"
_N = {"n": 1.0}


def _share(
    name: str, title: str, over: Mapping[str, float], under: Mapping[str, float] = _N, better: str = ""
) -> Ratio:
    return Ratio(name=name, title=title, over=dict(over), under=dict(under), better=better, topic=TOPIC)  # type: ignore[arg-type]


_CALIBRATION = (
    _share("brier", "Brier", {"brier": 1}, better="lower"),
    _share("overconfidence", "surer than right", {"confidence": 1, "sure_right": -1}),
)
_SCORE = _share("score", "score", {"score": 1}, better="higher")
_BINARY = (
    _SCORE,
    _share("always_yes", "always yes", {"gold_yes": 1}),
    _share("yes_rate", "said yes", {"yes": 1}),
    _share("balanced", "balanced", {"balanced": 1}, {"weight": 1}, "higher"),
    _share("auc", "order (AUC)", {"order": 1}, {"weight": 1}, "higher"),
    *_CALIBRATION,
)
_CHOICE = (
    _SCORE,
    _share("always_first", "always first", {"first_scores": 1}),
    _share("always_shortest", "always shortest", {"shortest_scores": 1}),
    _share("chance", "chance", {"chance": 1}),
    _share("first_rate", "on the first", {"first": 1}),
    _share("shortest_rate", "on the shortest", {"shortest": 1}),
    *_CALIBRATION,
)
_RANKED = _share("ranked", "either way", {"ranked": 1}, better="higher")
_WHOLE = _share("whole", "whole groups", {"group_right": 1}, {"groups": 1}, "higher")


def ratios_of(shape: Shape, *, groups: bool) -> list[Ratio]:
    """The figures beside a task's score.

    The score itself comes first. Always yes, first, shortest, chance: what a model scores that says only that. Said
    yes, on the first, on the shortest: how often (of shape ``mass`` with what share of the probability) the model does
    so. Balanced: the share right of the questions whose answer is yes and of those whose answer is no, averaged; no
    habit gets more than half. Order: the probability that of two questions, one of either answer, the model holds *yes*
    likelier of the one where it is right, ties half; a habit moves it not at all. Brier: the mean squared distance of
    the probability of *yes* (of the likeliest option) from what is so. Surer than right: mean probability of what is
    said less the share that is right, below 0 where the model is too shy. Either way: of pairs, *yes* is likelier
    behind the order in which it is right than behind the other. Whole groups: all questions of a group are right.
    """
    more = [*([_RANKED] if shape == "pair" else []), *([_WHOLE] if groups else [])]
    return [*(_BINARY if shape in ("yes", "pair") else _CHOICE), *more]


@dataclass
class Scored:
    """One question's result: the ``score`` in [0, 1], what was ``said`` (an index, None of a tie), and counts."""

    score: float
    said: int | None
    counts: dict[str, float] = field(default_factory=dict)


def score(
    shape: Shape,
    questions: Sequence[Question],
    likelihoods: Sequence[Sequence[float]],
    reverse: Sequence[Sequence[float]] = (),
) -> list[Scored]:
    """Score the questions of a task.

    Args:
        likelihoods: of each question's options, in nats.
        reverse: of shape ``pair`` the same behind the reverse text.
    """
    if shape in ("one", "mass"):
        scored = [_choice(shape, question, np.array(own)) for question, own in zip(questions, likelihoods, strict=True)]
    else:
        scored = [_yes_or_no(question, np.array(own)) for question, own in zip(questions, likelihoods, strict=True)]
        odds = np.array([own[1] - own[0] for own in likelihoods])
        yes = np.array([question.right == (1,) for question in questions])
        _order(scored, odds, yes)
    if shape == "pair":
        other = np.array([own[1] - own[0] for own in reverse])
        for each, mine, theirs, is_yes in zip(scored, odds, other, yes, strict=True):
            each.counts["ranked"] = float(mine > theirs if is_yes else mine < theirs)
    for each in scored:
        each.counts["score"] = each.score
    return scored


def count_groups(questions: Sequence[Question], scored: Sequence[Scored]) -> None:
    """Note with the first question of every cluster whether all of it is right."""
    members: dict[str, list[Scored]] = {}
    for question, each in zip(questions, scored, strict=True):
        members.setdefault(question.cluster or question.id, []).append(each)
    for group in members.values():
        group[0].counts |= {"groups": 1.0, "group_right": float(all(each.score == 1 for each in group))}


def _choice(shape: Shape, question: Question, likelihoods: NDArray[np.float64]) -> Scored:
    shares = _shares(likelihoods)
    right = np.isin(np.arange(len(shares)), question.right)
    said = _said(likelihoods)
    shortest = min(range(len(question.options)), key=lambda index: len(question.options[index]))
    mass = float(shares[right].sum())
    held = shares if shape == "mass" else np.arange(len(shares)) == (-1 if said is None else said)
    return Scored(
        mass if shape == "mass" else float(said is not None and right[said]),
        said,
        {
            "n": 1.0,
            "first": float(held[0]),
            "shortest": float(held[shortest]),
            "first_scores": float(right[0]),
            "shortest_scores": float(right[shortest]),
            "chance": float(right.mean()),
            **_calibration(float(shares.max()), said is not None and bool(right[said])),
        },
    )


def _yes_or_no(question: Question, likelihoods: NDArray[np.float64]) -> Scored:
    probability = float(_shares(likelihoods)[1])
    said, yes = _said(likelihoods), question.right == (1,)
    is_right = said is not None and said in question.right
    return Scored(
        float(is_right),
        said,
        {
            "n": 1.0,
            "yes": float(said == 1),
            "gold_yes": float(yes),
            **_calibration(max(probability, 1 - probability), is_right),
            "brier": (probability - yes) ** 2,
        },
    )


def _calibration(probability: float, is_right: bool) -> dict[str, float]:
    """Of what is said, or as good as said."""
    return {"brier": (probability - is_right) ** 2, "confidence": probability, "sure_right": float(is_right)}


def _order(scored: Sequence[Scored], odds: NDArray[np.float64], yes: NDArray[np.bool_]) -> None:
    """Counts whose ratio is the area under the curve, and the balanced share right.

    Each question counts with a weight by which both answers have half of it all. Its value is the area, moved by twice
    how far the share of the questions of the other answer that it is ordered right with lies from the area: the mean
    is the area, and the variance over questions DeLong's (1988), so that resampling questions gives its interval.
    """
    if yes.all() or not yes.any():
        return  # there is nothing to order; both ratios are over 0
    sides = np.sort(odds[~yes]), np.sort(odds[yes])
    placed = np.empty(len(odds))
    for index, (value, is_yes) in enumerate(zip(odds, yes, strict=True)):
        other = sides[0] if is_yes else sides[1]
        below, up_to = np.searchsorted(other, value, "left"), np.searchsorted(other, value, "right")
        share = (below + up_to) / (2 * len(other))
        placed[index] = share if is_yes else 1 - share
    area = float(placed[yes].mean())
    for each, share, is_yes in zip(scored, placed, yes, strict=True):
        weight = len(odds) / (2 * int((yes == is_yes).sum()))
        each.counts |= {
            "weight": weight,
            "balanced": weight * each.score,
            "order": weight * (area + 2 * (share - area)),
        }


def _said(likelihoods: NDArray[np.float64]) -> int | None:
    best = np.flatnonzero(likelihoods == likelihoods.max())
    return int(best[0]) if len(best) == 1 else None


def _shares(likelihoods: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of the options among themselves; far below what floats hold, too."""
    raised = np.exp(likelihoods - likelihoods.max())
    shares: NDArray[np.float64] = raised / raised.sum()
    return shares
