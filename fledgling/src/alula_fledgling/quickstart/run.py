"""Running the quickstart: jobs on all cores, resumable, then one record, one table and one report."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from functools import partial

from alula.errors import UsageError
from alula.evaluation import RunResult
from alula.jobs import Job, run_in
from alula.reports.outcome import BaseOutcome, MethodOutcome, Outcome, SeedOutcome, read_curve
from alula.training.environment import readable_environment
from alula_fledgling.quickstart import jobs
from alula_fledgling.quickstart.plan import ALIGN, BASE, METHODS, Plan
from alula_fledgling.weights import digest


def quickstart(plan: Plan, *, command: str, workers: int | None = None, quiet: bool = False) -> Outcome:
    """Align the fledgling host, tune it by every method, ask base and tuned models the same questions.

    Work that an earlier call of the same plan finished is not done again; a run that was killed goes on where it was.

    Args:
        plan: what to compare and where to write.
        command: the line that repeats this, for the record.
        workers: processes side by side; by default one per core (one on a GPU).
        quiet: draw no progress.

    Returns:
        The record, also written to ``plan.output / "outcome.json"``.

    Raises:
        UsageError: the output directory holds a run of another plan, or an unknown method.
    """
    unknown = [name for name in plan.methods if name not in {method.name for method in METHODS}]
    if unknown:
        raise UsageError(f"there is no method {unknown[0]!r}", remedy=f"use {', '.join(m.name for m in METHODS)}")
    work = list(_jobs(plan))
    seconds = run_in(plan.output, _facts(plan), "quickstart", work, label="quickstart", workers=workers, quiet=quiet)
    outcome = gather(plan, command=command, seconds=seconds)
    outcome.save(plan.output / "outcome.json")
    return outcome


def gather(plan: Plan, *, command: str, seconds: float) -> Outcome:
    """Put the finished answers of a plan together into one record."""
    bases = {seed: RunResult.load(jobs.answers_path(plan, seed, BASE)) for seed in plan.seeds}
    methods = {}
    for method in METHODS:
        if method.name not in plan.methods:
            continue
        outcomes = {}
        for seed in plan.seeds:
            trainable, spent = jobs.training_facts(plan, seed, method.name)
            outcomes[seed] = SeedOutcome.of(
                bases[seed],
                RunResult.load(jobs.answers_path(plan, seed, method.name)),
                metrics=plan.run_directory(seed, method.name) / "metrics.jsonl",
                trainable_parameters=trainable,
                seconds=spent,
            )
        methods[method.name] = MethodOutcome(
            label=method.label,
            description=method.description,
            learning_rates=plan.recipe(plan.seeds[0], method.name).stages[-1].learning_rates,
            seeds=outcomes,
        )
    return Outcome(
        title="Which words did the eyes cost?",
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment={
            **readable_environment(),
            "training seeds": ", ".join(map(str, plan.seeds)),
            "question seed": str(plan.task_seed),
        },
        seconds=seconds,
        base=BaseOutcome(
            label="base",
            description="the fledgling LLM and tower joined by a trained connector; the LLM as it was raised",
        ),
        shared_curves={seed: read_curve(plan.run_directory(seed, ALIGN) / "metrics.jsonl") for seed in plan.seeds},
        methods=methods,
    )


def _jobs(plan: Plan) -> Iterator[Job]:
    """All work, connectors first: everything else of a seed starts from its own."""
    questions = sum(len(task.items()) for task in plan.questions())

    def job(seed: int, name: str, call: Callable[..., None], *more: str) -> Job:
        return Job(
            title=f"{name}, seed {seed}",
            call=call,
            arguments=(plan, seed, *more),
            size=jobs.size_of(plan, seed, name, questions),
            done=partial(jobs.progress_of, plan, seed, name),
            after=() if name == ALIGN else (f"{ALIGN}, seed {seed}",),
        )

    for seed in plan.seeds:
        yield job(seed, ALIGN, jobs.align)
    for seed in plan.seeds:
        yield job(seed, BASE, jobs.answer_base)
        for name in plan.methods:
            yield job(seed, name, jobs.tune, name)


def _facts(plan: Plan) -> dict[str, object]:
    """What decides the answers; more seeds may join."""
    return {
        "fledgling": digest(),
        "methods": list(plan.methods),
        "items": plan.items,
        "task_seed": plan.task_seed,
        "steps": plan.steps,
    }
