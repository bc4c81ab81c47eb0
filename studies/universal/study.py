"""Running the study of the universal encoder: every seed's first stage, then every arm, measured."""

from __future__ import annotations

from functools import partial

from alula.files import read_json
from alula.jobs import Job, run_in
from studies.plan import logged_steps
from studies.records import origin
from studies.universal.measure import measure_arm, train_first
from studies.universal.plan import ARMS, IMAGE, UniversalPlan
from studies.universal.record import UniversalRecord


def universal(plan: UniversalPlan, *, command: str, workers: int | None = None, quiet: bool = False) -> UniversalRecord:
    """Train and measure every arm of every seed.

    Work that an earlier call finished is not done again, seeds may be added later, and a run that was killed goes on
    where it was.

    Args:
        command: the line that repeats this, for the record.
        workers: processes side by side; by default one per core.
        quiet: draw no progress.

    Returns:
        The record, also written to ``plan.output / "outcome.json"``.

    Raises:
        UsageError: the output directory holds something else.
    """
    jobs = [job for seed in plan.seeds for job in _jobs(plan, seed)]
    seconds = run_in(plan.output, plan.facts, "study", jobs, label="universal", workers=workers, quiet=quiet)
    record = UniversalRecord(
        **origin(command, seconds),
        settings={**plan.facts, "seeds": list(plan.seeds)},
        seeds={seed: {arm: read_json(plan.measured(seed, arm)) for arm in plan.arms} for seed in plan.seeds},
    )
    record.save(plan.output / "outcome.json")
    return record


def _jobs(plan: UniversalPlan, seed: int) -> list[Job]:
    first = plan.first(seed)
    start = f"{IMAGE}, seed {seed}"
    arms = [
        Job(
            title=f"{arm}, seed {seed}",
            call=measure_arm,
            arguments=(plan, seed, arm),
            size=sum(
                stage.steps or 0
                for name in ARMS[arm].models(arm, plan.captions)
                for stage in plan.recipe_of(seed, arm, name).stages
            ),
            done=partial(_done, plan, seed, arm),
            after=(start,),
        )
        for arm in plan.arms
    ]
    size = first.stages[0].steps or 0
    return [
        Job(title=start, call=train_first, arguments=(plan, seed), size=size, done=partial(logged_steps, first)),
        *arms,
    ]


def _done(plan: UniversalPlan, seed: int, arm: str) -> int:
    return sum(logged_steps(plan.recipe_of(seed, arm, name)) for name in ARMS[arm].models(arm, plan.captions))
