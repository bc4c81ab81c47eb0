"""A single pair of models as an experiment of one method and one training, so that it is reported the same way."""

from __future__ import annotations

import datetime
from pathlib import PurePath

from alula.evaluation import PairedRun
from alula.evaluation.results import Conditions
from alula.reports.outcome import BaseOutcome, MethodOutcome, Outcome, SeedOutcome


def comparison_outcome(pairs: PairedRun, *, command: str, seconds: float, seed: int = 0) -> Outcome:
    """Return the comparison as an `Outcome`; what is not known of the training stays empty."""
    tuned, base = _short(pairs.tuned, pairs.base)
    if tuned == base:
        tuned, base = _under(tuned, pairs.tuned_conditions), _under(base, pairs.base_conditions)
    return Outcome(
        title=f"{tuned} against {base}",
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment={},
        seconds=seconds,
        base=BaseOutcome(label=base, description=pairs.base),
        methods={
            "tuned": MethodOutcome(
                label=tuned,
                description="" if tuned == pairs.tuned else pairs.tuned,
                seeds={seed: SeedOutcome(tasks=pairs.tasks, conditions=pairs.tuned_conditions)},
            )
        },
    )


def _short(one: str, other: str) -> tuple[str, str]:
    """The last parts of two paths, as few as tell them apart."""
    parts, others = PurePath(one).parts, PurePath(other).parts
    for count in range(1, max(len(parts), len(others))):
        short, short_other = "/".join(parts[-count:]), "/".join(others[-count:])
        if short != short_other:
            return short, short_other
    return one, other


def _under(name: str, conditions: Conditions) -> str:
    """A model that is compared with itself, told apart by the policies on it."""
    return " with ".join(filter(None, (name, " and ".join(conditions.policies_in_words))))
