"""A single pair of models as an experiment of one method and one training, so that it is reported the same way; and
what the tuned one alone was asked."""

from __future__ import annotations

import datetime
from dataclasses import replace

from alula.evaluation import PairedRun, RunResult
from alula.evaluation.results import Conditions
from alula.reports.document import Section, render
from alula.reports.experiment import document
from alula.reports.names import short_names
from alula.reports.outcome import BaseOutcome, MethodOutcome, Outcome, SeedOutcome
from alula.reports.single import by_skill, scores, wrong_answers


def comparison_outcome(pairs: PairedRun, *, command: str, seconds: float, seed: int = 0) -> Outcome:
    """Return the comparison as an `Outcome`; what is not known of the training stays empty."""
    tuned, base = short_names(pairs.tuned, pairs.base)
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


def comparison_report(outcome: Outcome, tuned: RunResult) -> str:
    """Return the HTML report of a comparison: the experiment's, with what the tuned model was asked that its base was
    not, and with the tuned model's wrong answers.

    Args:
        outcome: of `comparison_outcome`.
        tuned: the run of the tuned model.
    """
    page = document(outcome)
    label = outcome.methods["tuned"].label
    alone = [task for name, task in tuned.tasks.items() if name not in outcome.tasks]
    more = []
    if alone:
        reading = [f"{outcome.base.label} was not asked these: it does not take what they show."]
        more.append(
            Section(
                f"Asked of {label} alone",
                reading,
                [scores(alone), *(by_skill(task) for task in alone if len(task.families) > 1)],
            )
        )
    told = wrong_answers(list(tuned.tasks.values()))
    if told.groups:
        reading = [f"What {label} got wrong, whether or not the base knew it."]
        more.append(Section(f"Wrong answers of {label}", reading, [told]))
    *others, last = page.sections
    return render(replace(page, sections=[*others, *more, last]))


def _under(name: str, conditions: Conditions) -> str:
    """A model that is compared with itself, told apart by the policies on it."""
    return " with ".join(filter(None, (name, " and ".join(conditions.policies_in_words))))
