"""Running the study of truthfulness: every arm trained, every model asked, one record."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from alula.evaluation import RunResult, evaluate_likelihood
from alula.jobs import Job, run_in
from alula.loading import load_model
from alula.training import train
from alula.training.environment import readable_environment
from alula_fledgling.quickstart.jobs import BATCH
from alula_fledgling.quickstart.plan import BASE
from alula_fledgling.tasks import truthfulness as questions
from studies.plan import logged_steps
from studies.truthfulness.arms import ARMS, Arm
from studies.truthfulness.plan import TruthPlan
from studies.truthfulness.record import TruthRecord, asked_of, numbers_of
from studies.truthfulness.streams import check_streams


def truthfulness(plan: TruthPlan, *, command: str, workers: int | None = None, quiet: bool = False) -> TruthRecord:
    """Tune one base by every arm, with the pictures and on the words alone, and weigh what all models hold true.

    Finished work is not done again, arms and seeds may be added later, and a run that was killed goes on where it was.

    Args:
        command: the line that repeats this, for the record.
        workers: processes side by side; by default one per core.
        quiet: draw no progress.

    Returns:
        The record, also written to ``plan.output / "outcome.json"``.

    Raises:
        UsageError: the output directory holds something else.
        EvaluationError: an arm would not read the words that its pair reads.
    """
    work = list(jobs_of(plan))
    seconds = run_in(plan.output, plan.facts, "study", work, label="truthfulness", workers=workers, quiet=quiet)
    names = [BASE, *(arm.name for arm in plan.chosen)]
    runs = {seed: {name: RunResult.load(plan.answers(seed, name)) for name in names} for seed in plan.seeds}
    first = runs[plan.seeds[0]][BASE]
    record = TruthRecord(
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment={**readable_environment(), "training seeds": ", ".join(map(str, plan.seeds))},
        seconds=seconds,
        settings=plan.facts,
        tasks=asked_of(first),
        seeds={seed: {name: numbers_of(run) for name, run in found.items()} for seed, found in runs.items()},
    )
    record.save(plan.output / "outcome.json")
    return record


def jobs_of(plan: TruthPlan) -> Iterator[Job]:
    """The connectors, then every arm of every seed, each asked when it is trained."""
    yield from plan.align_jobs()
    for seed in plan.seeds:
        after = plan.after_align(seed)
        yield Job(f"base asked, seed {seed}", ask, (plan, seed, BASE, plan.aligned(seed)), after=after)
    for arm in plan.chosen:
        for seed in plan.seeds:
            recipe = plan.recipe_of(seed, arm)
            yield Job(
                title=f"{arm.name}, seed {seed}",
                call=train_arm,
                arguments=(plan, seed, arm),
                size=sum(stage.steps or 0 for stage in recipe.stages) + 1,
                done=partial(_done, plan, seed, arm),
                after=plan.after_align(seed),
            )


def train_arm(plan: TruthPlan, seed: int, arm: Arm) -> None:
    """Train one arm and ask it; one that learns from words alone, only if they are those of the arm that sees."""
    if plan.answers(seed, arm.name).is_file():
        return
    recipe = plan.recipe_of(seed, arm)
    if not arm.sees:
        sighted = next(each for each in ARMS if each.pair == arm.pair and each.sees)
        check_streams(plan.recipe_of(seed, sighted), recipe, plan.aligned(seed))
    ask(plan, seed, arm.name, train(recipe, quiet=True).final)


def ask(plan: TruthPlan, seed: int, name: str, directory: Path) -> None:
    """Put all questions to the model in ``directory``, unless that was done."""
    path = plan.answers(seed, name)
    if not path.is_file():
        model, processor = load_model(directory)
        tasks = questions(plan.items, plan.task_seed)
        evaluate_likelihood(model, processor, tasks, name=name, batch_size=BATCH).save(path)


def _done(plan: TruthPlan, seed: int, arm: Arm) -> int:
    return logged_steps(plan.recipe_of(seed, arm)) + plan.answers(seed, arm.name).is_file()
