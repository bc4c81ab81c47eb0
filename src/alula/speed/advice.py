"""What a measurement says: which policy to take, and where none can pay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alula.policies import policy_of, save_policies
from alula.reports.wording import listing, percent
from alula.speed.grid import Candidate
from alula.speed.plan import BUDGETS
from alula.speed.record import Row, Speed, Spread

_SHORT = 2048
"""tokens of a batch of prompts below which an accelerator waits for its processor rather than computes"""
_FEW = 64
"""image tokens of a prompt below which the same can be said of a CPU"""


@dataclass(frozen=True)
class Recommendation:
    """The cheapest policy within a budget.

    Attributes:
        budget: what was asked for.
        row: the policy; None: none is faster than the model and within the budget.
        nearest: where there is none, the faster one that comes nearest.
        says: all that in words.
    """

    budget: Mapping[str, float]
    row: Row | None
    nearest: Row | None
    says: Sequence[str]


def recommend(speed: Speed, budget: Mapping[str, float]) -> Recommendation:
    """The policy with the shortest whole answers among those that are faster than the model and keep what is asked.

    Smaller pictures are no policy that could be saved: where they do better, that is said beside it.
    """
    found = _policy(speed, budget)
    within = [row for row in speed.rows if row.pixels < 1 and _time(row) < 1 and _margin(row, budget) >= 0]
    best = min(within, key=_time, default=None)
    if best is None or (found.row is not None and _time(found.row) <= _time(best)):
        return found
    kept = _kept(best, [name for name in BUDGETS if getattr(best, name) is not None])
    smaller = (
        f"{best.name!r} do without a policy, {kept}, and take {_share(best.answer)} of the time of an answer: give "
        "each image fewer pixels (max_pixels in data, the size of the model's image processor)."
    )
    return replace(found, says=[*found.says, smaller])


def _policy(speed: Speed, budget: Mapping[str, float]) -> Recommendation:
    asked = listing([f"{name} of at least {percent(least)}" for name, least in budget.items()])
    faster = [row for row in speed.rows if row.pixels == 1 and _time(row) < 1]
    if not faster:
        return Recommendation(
            budget, None, None, ["No policy that was measured is faster here than the model without."]
        )
    within = [row for row in faster if _margin(row, budget) >= 0]
    if within:
        best = min(within, key=_time)
        return Recommendation(budget, best, None, [_praise(speed, best, asked), *_doubts(speed, best, budget)])
    nearest = max(faster, key=lambda row: (_margin(row, budget), -_time(row)))
    return Recommendation(
        budget,
        None,
        nearest,
        [
            f"No policy that was measured keeps an {asked} and is faster. "
            f"The nearest is {nearest.name!r}, {_kept(nearest, budget)}, which takes {_share(nearest.answer)} of the "
            "time of an answer."
        ],
    )


def save_recommended(found: Recommendation, file: Path) -> Path | None:
    """Write the recommended policies to a file that `load_model` takes; where there are none, one of an earlier budget
    is removed, and None returned."""
    if found.row is None:
        file.unlink(missing_ok=True)
        return None
    policies = tuple(policy_of(settings) for settings in found.row.policies)
    return save_policies(Candidate(found.row.name, policies).named(), file)


def frontier(rows: Sequence[Row], quality: str = "agreement") -> list[Row]:
    """The rows that none is both faster than and at least as good as, fastest first.

    Args:
        quality: ``"agreement"`` or ``"accuracy"``.
    """
    measured = [row for row in rows if row.answer is not None and getattr(row, quality) is not None]
    found: list[Row] = []
    for row in sorted(measured, key=lambda row: (_time(row), -getattr(row, quality))):
        if not found or getattr(row, quality) > getattr(found[-1], quality):
            found.append(row)
    return found


def warnings(speed: Speed) -> list[str]:
    """Where a policy cannot pay on this model, data and machine."""
    host, found = speed.host, []
    if speed.settings["batch_size"] == 1:
        waits = ", and an accelerator waits between layers, which fewer tokens do not change"
        found.append(
            "Prompts came one at a time (--batch-size 1): a step then spends its time on weights, whatever the number "
            f"of keys{waits if speed.is_accelerated else ''}."
        )
    if speed.image_tokens < speed.prompt_tokens / 2:
        found.append(
            f"Prompts are mostly text: {speed.image_tokens} of {speed.prompt_tokens} tokens (medians) are of images, "
            "and policies spare no others."
        )
    batch = speed.prompt_tokens * min(speed.settings["batch_size"], speed.n)
    if speed.is_accelerated and batch < _SHORT:
        found.append(
            f"Prompts are short: a batch is some {batch} tokens, and below {_SHORT} an accelerator mostly waits for "
            "what is launched. Larger batches or larger images are where policies pay."
        )
    elif not speed.is_accelerated and speed.image_tokens < _FEW:
        found.append(
            f"Prompts are short: {speed.image_tokens} image tokens each. What choosing and packing cost by themselves "
            "is a large part of so little."
        )
    if host.tower_share > 0.3:
        found.append(
            f"{percent(host.tower_share, 0)} of what a prompt computes is the vision tower's, which policies leave as "
            "it is."
        )
    if host.decode_share > 0.5:
        found.append(
            f"Answers take {percent(host.decode_share, 0)} of their time behind the prompt ({host.answer_tokens:.0f} "
            f"tokens each): what is saved in prompts alone can be {percent(1 - host.decode_share, 0)} at most."
        )
    slower = [row.name for row in speed.rows if row.answer is not None and row.answer.median > 1]
    if slower:
        found.append(f"Slower here than the model without a policy: {listing(slower)}.")
    return found


def _time(row: Row) -> float:
    return row.answer.median if row.answer is not None else float("inf")


def _margin(row: Row, budget: Mapping[str, float]) -> float:
    """By how much it keeps more than what is asked for, at its tightest."""
    values = {name: getattr(row, name) for name in budget}
    return min(-1.0 if value is None else value - budget[name] for name, value in values.items())


def _praise(speed: Speed, row: Row, asked: str) -> str:
    kept = _kept(row, [name for name in BUDGETS if getattr(row, name) is not None])
    return (
        f"{row.name!r} is the cheapest with an {asked}: {kept}. A whole answer takes {_share(row.answer)} of the time, "
        f"the prompt {_share(row.prefill)}, and the cache {percent(row.cache, 0)} of the memory."
    )


def _doubts(speed: Speed, row: Row, budget: Mapping[str, float]) -> list[str]:
    found = []
    agreement = row.parts["all"].agreement
    if "agreement" in budget and agreement.low < budget["agreement"]:
        found.append(
            f"Of {speed.n} answers: the 95 % interval of its agreement reaches down to {percent(agreement.low)}. More "
            "--items narrow it."
        )
    if row.answer is not None and row.answer.median > speed.itself.low:
        found.append(
            f"The saving is within what the model beside itself varies by ({speed.itself.low:.2f} to "
            f"{speed.itself.high:.2f}). More --rounds tell."
        )
    return found


def _kept(row: Row, names: Iterable[str]) -> str:
    return listing([f"{name} {percent(getattr(row, name))}" for name in names])


def _share(spread: Spread | None) -> str:
    return percent(None if spread is None else spread.median, 0)
