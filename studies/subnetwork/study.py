"""Running the study of subnetworks: models trained or lent, then pruned, asked and healed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from alula.jobs import Job, run_in
from studies.records import origin
from studies.subnetwork.kinds import kinds_measurements, measure_kinds
from studies.subnetwork.measure import measure, measurements
from studies.subnetwork.plan import SubnetworkPlan
from studies.subnetwork.record import SubnetworkRecord, gather_seed


def subnetwork(
    plan: SubnetworkPlan, *, command: str, workers: int | None = None, quiet: bool = False
) -> SubnetworkRecord:
    """Train what no lent quickstart has trained, and ask every model the same questions without some of its weights.

    Work that an earlier call finished is not done again, parts, sparsities and seeds may be added later, and a run that
    was killed goes on where it was.

    Args:
        command: the line that repeats this, for the record.
        workers: processes side by side; by default one per core.
        quiet: draw no progress.

    Returns:
        The record, also written to ``plan.output / "outcome.json"``.

    Raises:
        UsageError: the output directory holds something else.
    """
    jobs: list[Job] = []
    if plan.tuned:
        jobs += plan.training_jobs()
        jobs += [plan.measuring_job(seed, "without weights", measure, measurements(plan, seed)) for seed in plan.seeds]
    if "kinds" in plan.parts:
        for seed in plan.seeds:
            training = plan.kinds_training(seed)
            asked = plan.measuring_job(seed, "four kinds asked", measure_kinds, kinds_measurements(plan, seed))
            jobs += [*training, dataclasses.replace(asked, after=tuple(job.title for job in training))]
    seconds = run_in(plan.output, plan.facts, "study", jobs, label="subnetwork", workers=workers, quiet=quiet)
    record = gather(plan, command=command, seconds=seconds)
    record.save(plan.output / "outcome.json")
    return record


def gather(plan: SubnetworkPlan, *, command: str, seconds: float) -> SubnetworkRecord:
    """Put the finished measurements of a plan together."""

    def files(seed: int) -> list[Path]:
        own = measurements(plan, seed) if plan.tuned else []
        return [*own, *(kinds_measurements(plan, seed) if "kinds" in plan.parts else [])]

    seeds = {seed: gather_seed(plan.read_measured(seed, files(seed))) for seed in plan.seeds}
    return SubnetworkRecord(
        **origin(command, seconds),
        settings={
            **plan.facts,
            "parts": list(plan.parts),
            "seeds": list(plan.seeds),
            "sparsities": list(plan.sparsities),
        },
        seeds=seeds,
    )
