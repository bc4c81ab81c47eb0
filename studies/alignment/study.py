"""Running the alignment study: the population, then the five questions."""

from __future__ import annotations

from functools import partial

from alula.jobs import Job, run_in
from studies.alignment.measure import BEFORE, save_untrained_tower, train_run
from studies.alignment.plan import UNTRAINED_TOWER, AlignmentPlan, Run
from studies.alignment.record import AlignmentRecord, Measurement, RunRecord, answer
from studies.plan import logged_steps
from studies.population import measured, read_measurement
from studies.records import origin

_MEASURING = 40  # one measurement takes about as long as so many training steps
_TOWER = "the untrained tower"


def alignment(plan: AlignmentPlan, *, command: str, workers: int | None = None, quiet: bool = False) -> AlignmentRecord:
    """Train the population, measure its models, answer IMA's questions.

    Work that an earlier call of the same plan finished is not done again; a run that was killed goes on where it was.

    Args:
        command: the line that repeats this, for the record.
        workers: processes side by side; by default one per core.
        quiet: draw no progress.

    Returns:
        The record, also written to ``plan.output / "outcome.json"``.

    Raises:
        UsageError: the output directory holds something else.
    """
    jobs = [Job(_TOWER, save_untrained_tower, (plan,)), *(_job(plan, run) for run in plan.runs)]
    seconds = run_in(plan.output, plan.facts, "study", jobs, label="alignment", workers=workers, quiet=quiet)
    record = gather(plan, command=command, seconds=seconds)
    record.save(plan.output / "outcome.json")
    return record


def gather(plan: AlignmentPlan, *, command: str, seconds: float) -> AlignmentRecord:
    """Put the finished measurements of a plan together."""
    runs = [
        RunRecord(
            seed=run.seed,
            configuration=run.configuration.name,
            label=run.configuration.label,
            models={
                step: Measurement.model_validate(read_measurement(plan.measurements(run), step))
                for step in (BEFORE, *plan.milestones)
            },
        )
        for run in plan.runs
    ]
    return AlignmentRecord(
        **origin(command, seconds),
        settings={**plan.facts, "seeds": list(plan.seeds)},
        runs=runs,
        answers=answer(runs),
    )


def _job(plan: AlignmentPlan, run: Run) -> Job:
    needs_tower = run.configuration.host.get("vision") == UNTRAINED_TOWER
    return Job(
        title=run.title,
        call=train_run,
        arguments=(plan, run),
        size=plan.milestones[-1] + _MEASURING * (1 + len(plan.milestones)),
        done=partial(_done, plan, run),
        after=(_TOWER,) if needs_tower else (),
    )


def _done(plan: AlignmentPlan, run: Run) -> int:
    steps = (BEFORE, *plan.milestones)
    return logged_steps(plan.recipe_of(run)) + _MEASURING * measured(plan.measurements(run), steps)
