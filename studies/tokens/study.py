"""Running the study of tokenizers."""

from __future__ import annotations

from functools import partial

from alula.jobs import Job, run_in
from studies.plan import written_files
from studies.records import origin
from studies.tokens.measure import measure, measurements
from studies.tokens.plan import TokensPlan
from studies.tokens.record import Measured, TokensRecord


def tokens(plan: TokensPlan, *, command: str, workers: int | None = None, quiet: bool = False) -> TokensRecord:
    """Fit every tokenizer, train every arm and ask all the same.

    Work that an earlier call finished is not done again, arms and seeds may be added later, and a run that was killed
    goes on where it was.

    Args:
        command: the line that repeats this, for the record.
        workers: processes side by side; by default one per core.
        quiet: draw no progress.

    Returns:
        The record, also written to ``plan.output / "outcome.json"``.

    Raises:
        UsageError: the output directory holds something else.
    """
    jobs = [
        Job(
            title=f"tokens, seed {seed}",
            call=measure,
            arguments=(plan, seed),
            size=len(plan.arms),
            done=partial(written_files, tuple(measurements(plan, seed))),
        )
        for seed in plan.seeds
    ]
    seconds = run_in(plan.output, plan.facts, "study", jobs, label="tokens", workers=workers, quiet=quiet)
    read = {seed: plan.read_measured(seed, measurements(plan, seed)) for seed in plan.seeds}
    record = TokensRecord(
        **origin(command, seconds),
        settings={**plan.facts, "seeds": list(plan.seeds)},
        seeds={seed: {arm: Measured(**found[arm]) for arm in plan.arms} for seed, found in read.items()},
    )
    record.save(plan.output / "outcome.json")
    return record
