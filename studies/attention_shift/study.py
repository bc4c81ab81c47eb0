"""Running the attention-shift study: the population, then the correlations."""

from __future__ import annotations

from functools import partial

from alula.files import read_json
from alula.jobs import Job, run_in
from studies.attention_shift.measure import measure_base, train_run
from studies.attention_shift.plan import Run, ShiftPlan
from studies.attention_shift.record import Measurement, RunRecord, ShiftRecord, associations
from studies.plan import logged_steps
from studies.population import measured, read_measurement
from studies.records import origin

_MEASURING = 20  # one measurement takes about as long as so many training steps


def attention_shift(plan: ShiftPlan, *, command: str, workers: int | None = None, quiet: bool = False) -> ShiftRecord:
    """Train the population, measure its models, correlate attention shift with text accuracy.

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
    bases = [
        Job(f"measure the base, seed {seed}", measure_base, (plan, seed), after=plan.after_align(seed))
        for seed in plan.seeds
    ]
    jobs = [*plan.align_jobs(), *bases, *(_job(plan, run) for run in plan.runs)]
    seconds = run_in(plan.output, plan.facts, "study", jobs, label="attention shift", workers=workers, quiet=quiet)
    record = gather(plan, command=command, seconds=seconds)
    record.save(plan.output / "outcome.json")
    return record


def gather(plan: ShiftPlan, *, command: str, seconds: float) -> ShiftRecord:
    """Put the finished measurements of a plan together."""
    runs = [
        RunRecord(
            seed=run.seed,
            text=run.text,
            rate=run.rate,
            models={step: Measurement.of(read_measurement(plan.measurements(run), step)) for step in plan.milestones},
        )
        for run in plan.runs
    ]
    bases = {seed: Measurement.of(read_json(plan.base_measurement(seed))) for seed in plan.seeds}
    found, skipped = associations(runs)
    return ShiftRecord(
        **origin(command, seconds),
        settings={**plan.facts, "seeds": list(plan.seeds)},
        bases=bases,
        runs=runs,
        skipped=skipped,
        associations=found,
    )


def _job(plan: ShiftPlan, run: Run) -> Job:
    return Job(
        title=run.title,
        call=train_run,
        arguments=(plan, run),
        size=plan.milestones[-1] + _MEASURING * len(plan.milestones),
        done=partial(_done, plan, run),
        after=plan.after_align(run.seed),
    )


def _done(plan: ShiftPlan, run: Run) -> int:
    return logged_steps(plan.recipe_of(run)) + _MEASURING * measured(plan.measurements(run), plan.milestones)
