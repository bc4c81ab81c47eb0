"""Running the study of subnetworks: models trained or lent, then pruned, asked and healed."""

from __future__ import annotations

import datetime

from alula.jobs import run_in
from alula.training.environment import readable_environment
from studies.subnetwork.measure import measure, measurements
from studies.subnetwork.plan import SubnetworkPlan
from studies.subnetwork.record import SubnetworkRecord, gather_seed


def subnetwork(
    plan: SubnetworkPlan, *, command: str, workers: int | None = None, quiet: bool = False
) -> SubnetworkRecord:
    """Train what no lent quickstart has trained, and ask every model the same questions without some of its weights.

    Work that an earlier call finished is not done again, sparsities and seeds may be added later, and a run that was
    killed goes on where it was.

    Args:
        command: the line that repeats this, for the record.
        workers: processes side by side; by default one per core.
        quiet: draw no progress.

    Returns:
        The record, also written to ``plan.output / "outcome.json"``.

    Raises:
        UsageError: the output directory holds something else.
    """
    asked = [plan.measuring_job(seed, "without weights", measure, measurements(plan, seed)) for seed in plan.seeds]
    jobs = [*plan.training_jobs(), *asked]
    seconds = run_in(plan.output, plan.facts, "study", jobs, label="subnetwork", workers=workers, quiet=quiet)
    record = gather(plan, command=command, seconds=seconds)
    record.save(plan.output / "outcome.json")
    return record


def gather(plan: SubnetworkPlan, *, command: str, seconds: float) -> SubnetworkRecord:
    """Put the finished measurements of a plan together."""
    seeds = {seed: gather_seed(plan.read_measured(seed, measurements(plan, seed))) for seed in plan.seeds}
    return SubnetworkRecord(
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment=readable_environment(),
        seconds=seconds,
        settings={**plan.facts, "seeds": list(plan.seeds), "sparsities": list(plan.sparsities)},
        seeds=seeds,
    )
