"""Running the study of browsing: every lent model tuned on with and without it, and asked."""

from __future__ import annotations

from alula.jobs import run_in
from studies.browse.measure import CAPTIONED, HELD, MOVED, measure, measurements
from studies.browse.plan import ARMS, BrowsePlan
from studies.browse.record import Asked, BrowseRecord
from studies.records import origin


def browse(plan: BrowsePlan, *, command: str, workers: int | None = None, quiet: bool = False) -> BrowseRecord:
    """Tune every model by every arm and ask all the same questions.

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
    asked = [plan.measuring_job(seed, "browsed", measure, measurements(plan, seed)) for seed in plan.seeds]
    jobs = [*plan.training_jobs(), *asked]
    seconds = run_in(plan.output, plan.facts, "study", jobs, label="browse", workers=workers, quiet=quiet)
    read = {seed: plan.read_measured(seed, measurements(plan, seed)) for seed in plan.seeds}
    record = BrowseRecord(
        **origin(command, seconds),
        settings={**plan.facts, "seeds": list(plan.seeds)},
        seeds={
            seed: {
                arm: Asked(
                    **found[arm],
                    moved=found[MOVED].get(arm),
                    captions=found[CAPTIONED] if arm == "staged" else None,
                )
                for arm in ARMS
            }
            for seed, found in read.items()
        },
        held={seed: found[HELD] for seed, found in read.items()},
    )
    record.save(plan.output / "outcome.json")
    return record
