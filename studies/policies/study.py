"""Running the policy study: models trained or lent, then each under every policy."""

from __future__ import annotations

from alula.jobs import run_in
from studies.policies.measure import measure, measurements
from studies.policies.plan import PoliciesPlan
from studies.policies.questions import KINDS
from studies.policies.record import PoliciesRecord, gather_seed
from studies.records import origin


def policies(plan: PoliciesPlan, *, command: str, workers: int | None = None, quiet: bool = False) -> PoliciesRecord:
    """Train what no lent quickstart has trained, ask every model the same questions under every policy.

    Work that an earlier call finished is not done again, parts, criteria and seeds may be added later, and a run that
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
    asked = [plan.measuring_job(seed, "under policies", measure, measurements(plan, seed)) for seed in plan.seeds]
    jobs = [*plan.training_jobs(), *asked]
    seconds = run_in(plan.output, plan.facts, "study", jobs, label="policies", workers=workers, quiet=quiet)
    record = gather(plan, command=command, seconds=seconds)
    record.save(plan.output / "outcome.json")
    return record


def gather(plan: PoliciesPlan, *, command: str, seconds: float) -> PoliciesRecord:
    """Put the finished measurements of a plan together."""
    seeds = {seed: gather_seed(plan.read_measured(seed, measurements(plan, seed))) for seed in plan.seeds}
    return PoliciesRecord(
        **origin(command, seconds),
        settings={**plan.facts, "seeds": list(plan.seeds), "shares": list(plan.shares)},
        kinds=[KINDS[index % len(KINDS)] for index in range(plan.items * len(KINDS))],
        seeds=seeds,
    )
