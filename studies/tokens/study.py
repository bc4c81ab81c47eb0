"""Running the study of tokenizers."""

from __future__ import annotations

from alula.files import read_json
from alula.jobs import Job, run_in
from studies.records import origin
from studies.tokens.measure import fit, measure
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
    seconds = run_in(plan.output, plan.facts, "study", _jobs(plan), label="tokens", workers=workers, quiet=quiet)
    record = TokensRecord(
        **origin(command, seconds),
        settings={**plan.facts, "seeds": list(plan.seeds)},
        seeds={
            seed: {arm: Measured(**read_json(plan.measurement(seed, arm))) for arm in plan.arms} for seed in plan.seeds
        },
    )
    record.save(plan.output / "outcome.json")
    return record


def _jobs(plan: TokensPlan) -> list[Job]:
    """Every tokenizer, and every arm behind its own; arm by arm, so that what is there early is there of all seeds."""
    needed = dict.fromkeys(name for arm in plan.arms for name in plan.codes_of(arm))
    fits = [
        Job(
            title=f"codes {name}, seed {seed}",
            call=fit,
            arguments=(plan, seed, name),
            done=plan.codes_directory(seed, name).is_dir,
        )
        for name in needed
        for seed in plan.seeds
    ]
    arms = [
        Job(
            title=f"{arm}, seed {seed}",
            call=measure,
            arguments=(plan, seed, arm),
            done=plan.measurement(seed, arm).is_file,
            after=tuple(f"codes {name}, seed {seed}" for name in plan.codes_of(arm)),
        )
        for arm in plan.arms
        for seed in plan.seeds
    ]
    return [*fits, *arms]
