"""Running the frontier: an ablation, how far each tuned model has gone from the base, and what it sees a turn later."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import fmean

from alula.evaluation import RunResult, evaluate
from alula.files import read_json, write_json
from alula.jobs import Job, lines, run_in
from alula.loading import load_model
from alula_fledgling.quickstart.jobs import BATCH
from alula_fledgling.quickstart.plan import BASE
from alula_fledgling.tasks import visual_later
from studies.arms import Arm, arm_jobs, gather
from studies.arms.study import title
from studies.frontier.aim import REFERENCE
from studies.frontier.arms import ARMS
from studies.frontier.cost import costs
from studies.frontier.divergence import divergences
from studies.frontier.plan import FrontierPlan
from studies.frontier.record import FrontierOutcome
from studies.passes import held_out


def frontier(plan: FrontierPlan, *, command: str, workers: int | None = None, quiet: bool = False) -> FrontierOutcome:
    """Tune one base by every arm, ask all models the same questions, measure divergence from the base and time.

    As `studies.arms.run`: finished work is not done again, arms and seeds may be added later.
    """
    work = [*arm_jobs(plan), *_divergence_jobs(plan), *_later_jobs(plan)]
    run_in(plan.output, plan.facts, "study", work, label="frontier", workers=workers, quiet=quiet)
    # alone: whatever ran beside them would be in the times
    alone = 0 if workers == 0 else 1
    timings = list(_cost_jobs(plan))
    seconds = run_in(plan.output, plan.facts, "study", timings, label="times", workers=alone, quiet=quiet)
    outcome = gather(plan, command=command, seconds=seconds)
    found = {
        arm.name: {seed: fmean(read_json(plan.divergence_path(seed, arm.name))["nats"]) for seed in plan.seeds}
        for arm in plan.chosen
    }
    asked = (BASE, *(arm.name for arm in plan.chosen))
    later = {name: {seed: _right_later(plan, seed, name) for seed in plan.seeds} for name in asked}
    times = {arm.name: read_json(plan.costs_path(arm.name))["ratios"] for arm in _timed(plan)}
    record = FrontierOutcome(**dict(outcome), divergence=found, later=later, costs=times)
    record.save(plan.output / "outcome.json")
    return record


def measure_divergence(plan: FrontierPlan, seed: int, name: str) -> None:
    """Measure how far an arm has gone from the base on held-out visual questions, those of the task `visual`."""
    path = plan.divergence_path(seed, name)
    if not path.is_file():
        base, processor = load_model(plan.aligned(seed))
        tuned, _ = load_model(plan.trained(seed, name))
        samples = held_out("visual", plan.items, plan.task_seed)
        write_json(path, {"nats": divergences(base, tuned, processor, samples)})


def measure_later(plan: FrontierPlan, seed: int, name: str) -> None:
    """Ask an arm, or the base, the questions of the task `visual` a turn later than their images."""
    path = plan.later_path(seed, name)
    if not path.is_file():
        model, processor = load_model(plan.aligned(seed) if name == BASE else plan.trained(seed, name))
        journal = path.with_suffix(".jsonl")
        task = visual_later(plan.items, plan.task_seed)
        evaluate(model, processor, [task], name=name, batch_size=BATCH, journal=journal).save(path)


def _right_later(plan: FrontierPlan, seed: int, name: str) -> float:
    (task,) = RunResult.load(plan.later_path(seed, name)).tasks.values()
    return task.accuracy


def measure_cost(plan: FrontierPlan, name: str) -> None:
    """Measure an arm's training time beside full tuning's, from the connector of the first seed."""
    arm, reference = (next(each for each in ARMS if each.name == wanted) for wanted in (name, REFERENCE))
    seed = plan.seeds[0]
    costs(plan.costs_path(name), plan.recipe_of(seed, arm), plan.recipe_of(seed, reference), plan.rounds)


def _timed(plan: FrontierPlan) -> list[Arm]:
    return [arm for arm in plan.chosen if arm.name != REFERENCE] if plan.rounds else []


def _cost_jobs(plan: FrontierPlan) -> Iterator[Job]:
    for arm in _timed(plan):
        yield Job(title=f"time of {arm.name}", call=measure_cost, arguments=(plan, arm.name))


def _divergence_jobs(plan: FrontierPlan) -> Iterator[Job]:
    for seed in plan.seeds:
        for arm in plan.chosen:
            own = plan.holder(seed, arm.name) is plan.own
            yield Job(
                title=f"divergence of {arm.name}, seed {seed}",
                call=measure_divergence,
                arguments=(plan, seed, arm.name),
                size=plan.items,
                done=partial(_measured, plan, seed, arm.name),
                after=(title(arm, seed),) if own else (),
            )


def _later_jobs(plan: FrontierPlan) -> Iterator[Job]:
    for seed in plan.seeds:
        for arm in (None, *plan.chosen):
            name = BASE if arm is None else arm.name
            own = plan.holder(seed, name) is plan.own
            first = () if not own else plan.after_align(seed) if arm is None else (title(arm, seed),)
            yield Job(
                title=f"{name} a turn later, seed {seed}",
                call=measure_later,
                arguments=(plan, seed, name),
                size=plan.items,
                done=partial(_asked_later, plan, seed, name),
                after=first,
            )


def _asked_later(plan: FrontierPlan, seed: int, name: str) -> int:
    return max(0, lines(plan.later_path(seed, name).with_suffix(".jsonl")) - 1)


def _measured(plan: FrontierPlan, seed: int, name: str) -> int:
    return plan.items if plan.divergence_path(seed, name).is_file() else 0
