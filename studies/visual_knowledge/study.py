"""Running the study of visual knowledge: every arm from one connector per seed, all asked the same questions."""

from __future__ import annotations

from functools import partial

from alula.files import read_json
from alula.jobs import Job, run_in
from alula.training import train
from studies.plan import logged_steps
from studies.records import origin
from studies.visual_knowledge.arms import BEFORE, Arm
from studies.visual_knowledge.measure import measure
from studies.visual_knowledge.plan import KnowledgePlan
from studies.visual_knowledge.record import KnowledgeRecord


def visual_knowledge(
    plan: KnowledgePlan, *, command: str, workers: int | None = None, quiet: bool = False
) -> KnowledgeRecord:
    """Train every arm and ask all models the same questions, before and after.

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
        EvaluationError: adapters train different numbers of weights.
    """
    jobs = [*plan.align_jobs(), *(job for seed in plan.seeds for job in _jobs(plan, seed))]
    seconds = run_in(plan.output, plan.facts, "study", jobs, label="visual-knowledge", workers=workers, quiet=quiet)
    names = [BEFORE, *(arm.name for arm in plan.chosen)]
    record = KnowledgeRecord(
        **origin(command, seconds),
        settings={**plan.facts, "seeds": list(plan.seeds)},
        seeds={seed: {name: read_json(plan.measured(seed, name)) for name in names} for seed in plan.seeds},
    )
    record.check()
    record.save(plan.output / "outcome.json")
    return record


def train_arm(plan: KnowledgePlan, seed: int, arm: Arm) -> None:
    """Train an arm, then measure it."""
    if not plan.measured(seed, arm.name).is_file():
        train(plan.recipe_of(seed, arm), quiet=True)
    measure(plan, seed, arm.name)


def _jobs(plan: KnowledgePlan, seed: int) -> list[Job]:
    before = Job(
        title=f"before, seed {seed}",
        call=measure,
        arguments=(plan, seed, BEFORE),
        done=partial(_measured, plan, seed, BEFORE),
        after=plan.after_align(seed),
    )
    return [before] + [
        Job(
            title=f"{arm.name}, seed {seed}",
            call=train_arm,
            arguments=(plan, seed, arm),
            size=sum(stage.steps or 0 for stage in plan.recipe_of(seed, arm).stages) + 1,
            done=partial(_done, plan, seed, arm),
            after=plan.after_align(seed),
        )
        for arm in plan.chosen
    ]


def _done(plan: KnowledgePlan, seed: int, arm: Arm) -> int:
    return logged_steps(plan.recipe_of(seed, arm)) + _measured(plan, seed, arm.name)


def _measured(plan: KnowledgePlan, seed: int, name: str) -> int:
    return int(plan.measured(seed, name).is_file())
