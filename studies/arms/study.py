"""Running an ablation: every arm from the same connector, every model asked the same questions."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from functools import partial

from alula.evaluation import RunResult
from alula.jobs import Job, lines, run_in
from alula.reports.outcome import BaseOutcome, MethodOutcome, Outcome, SeedOutcome
from alula.training import train
from alula.training.environment import readable_environment
from alula_fledgling.quickstart import jobs
from alula_fledgling.quickstart.plan import BASE
from studies.arms.ablation import Arm
from studies.arms.plan import ArmsPlan
from studies.plan import logged_steps


def run(plan: ArmsPlan, *, command: str, workers: int | None = None, quiet: bool = False) -> Outcome:
    """Tune one base by every arm, ask all models the same questions, compare them item by item.

    Work that an earlier call finished is not done again, arms may be added later, and a run that was killed goes on
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
    name = plan.ablation.name
    seconds = run_in(plan.output, plan.facts, "study", list(arm_jobs(plan)), label=name, workers=workers, quiet=quiet)
    outcome = gather(plan, command=command, seconds=seconds)
    outcome.save(plan.output / "outcome.json")
    return outcome


def gather(plan: ArmsPlan, *, command: str, seconds: float) -> Outcome:
    """Put the finished answers of all arms together into one record."""
    bases = {seed: _answers(plan, seed, BASE) for seed in plan.seeds}
    methods = {}
    for arm in plan.chosen:
        outcomes = {}
        for seed in plan.seeds:
            trainable, spent = jobs.training_facts(plan.holder(seed, arm.name), seed, arm.name)
            outcomes[seed] = SeedOutcome.of(
                bases[seed],
                _answers(plan, seed, arm.name),
                trainable_parameters=trainable,
                seconds=spent,
                kept_flips=0,
            )
        rates = plan.recipe_of(plan.seeds[0], arm).stages[-1].learning_rates
        methods[arm.name] = MethodOutcome(
            label=arm.label, description=arm.description, learning_rates=rates, seeds=outcomes
        )
    return Outcome(
        title=plan.ablation.title,
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment={
            **readable_environment(),
            "training seeds": ", ".join(map(str, plan.seeds)),
            "question seed": str(plan.task_seed),
        },
        seconds=seconds,
        base=BaseOutcome(label="base", description="the fledgling LLM and tower joined by a trained connector"),
        methods=methods,
    )


def arm_jobs(plan: ArmsPlan) -> Iterator[Job]:
    """All work that no lent quickstart has done: connectors, answers of the bases, arms."""
    yield from plan.align_jobs()
    questions = sum(len(task.items()) for task in plan.own.questions())
    for seed in plan.seeds:
        if plan.holder(seed, BASE) is plan.own:
            yield Job(
                title=f"base, seed {seed}",
                call=answer_base,
                arguments=(plan, seed),
                size=questions,
                done=partial(_answered, plan, seed, BASE),
                after=plan.after_align(seed),
            )
        for arm in plan.chosen:
            if plan.holder(seed, arm.name) is plan.own:
                yield Job(
                    title=title(arm, seed),
                    call=train_arm,
                    arguments=(plan, seed, arm),
                    size=sum(stage.steps or 0 for stage in plan.recipe_of(seed, arm).stages) + questions,
                    done=partial(_done, plan, seed, arm),
                    after=plan.after_align(seed),
                )


def title(arm: Arm, seed: int) -> str:
    """Of the job that trains an arm."""
    return f"{arm.name}, seed {seed}"


def train_arm(plan: ArmsPlan, seed: int, arm: Arm) -> None:
    """Train one arm, then put all tasks to it."""
    jobs.answer(plan.own, seed, arm.name, train(plan.recipe_of(seed, arm), quiet=True).final)


def answer_base(plan: ArmsPlan, seed: int) -> None:
    """Put all tasks to the base of a seed."""
    jobs.answer(plan.own, seed, BASE, plan.aligned(seed))


def _answers(plan: ArmsPlan, seed: int, name: str) -> RunResult:
    run = RunResult.load(jobs.answers_path(plan.holder(seed, name), seed, name))
    return run.model_copy(update={"tasks": {task: run.tasks[task] for task in plan.ablation.tasks}})


def _done(plan: ArmsPlan, seed: int, arm: Arm) -> int:
    return logged_steps(plan.recipe_of(seed, arm)) + _answered(plan, seed, arm.name)


def _answered(plan: ArmsPlan, seed: int, name: str) -> int:
    return max(0, lines(jobs.journal_path(plan.own, seed, name)) - 1)
