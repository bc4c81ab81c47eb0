"""Running the study of demonstrations: a host and a map per seed, measured."""

from __future__ import annotations

from functools import partial

from alula.files import read_json
from alula.jobs import Job, lines, run_in
from alula.training import train
from studies.demonstrations.measure import measure, show
from studies.demonstrations.plan import DemonstrationsPlan
from studies.demonstrations.record import DemonstrationsRecord
from studies.examples import Shown
from studies.records import origin


def demonstrations(
    plan: DemonstrationsPlan, *, command: str, workers: int | None = None, quiet: bool = False
) -> DemonstrationsRecord:
    """Teach every seed's host to read demonstrations, train its map, and ask held-out episodes.

    Args:
        command: the line that repeats this, for the record.
        workers: processes side by side; by default one per core.
        quiet: draw no progress.

    Returns:
        The record, also written to ``plan.output / "outcome.json"``.

    Raises:
        UsageError: the output directory holds something else.
    """
    jobs = plan.training_jobs()
    for seed in plan.seeds:
        teaching, steps = f"demonstrations, seed {seed}", sum(stage.steps or 0 for stage in plan.recipe_of(seed).stages)
        jobs += [
            Job(
                title=teaching,
                call=teach,
                arguments=(plan, seed),
                size=steps,
                done=partial(_taught, plan, seed),
                after=plan.after_training(seed),
            ),
            Job(
                title=f"asked, seed {seed}",
                call=measure,
                arguments=(plan, seed),
                size=1,
                done=partial(_measured, plan, seed),
                after=(teaching,),
            ),
        ]
    first = (f"demonstrations, seed {plan.seeds[0]}",)
    jobs.append(
        Job(title="episodes to look at", call=show, arguments=(plan,), size=1, done=plan.shown.is_file, after=first)
    )
    seconds = run_in(plan.output, plan.facts, "study", jobs, label="demonstrations", workers=workers, quiet=quiet)
    record = DemonstrationsRecord(
        **origin(command, seconds),
        settings={**plan.facts, "seeds": list(plan.seeds)},
        seeds={seed: read_json(plan.measured_file(seed)) for seed in plan.seeds},
        shown=tuple(Shown.model_validate(each) for each in read_json(plan.shown)),
    )
    record.save(plan.output / "outcome.json")
    return record


def teach(plan: DemonstrationsPlan, seed: int) -> None:
    """Train a seed's host and map."""
    train(plan.recipe_of(seed), quiet=True)


def _taught(plan: DemonstrationsPlan, seed: int) -> int:
    recipe = plan.recipe_of(seed)
    return lines(plan.own.run_directory(seed, "aim") / "metrics.jsonl") * recipe.stages[-1].log_every


def _measured(plan: DemonstrationsPlan, seed: int) -> int:
    return int(plan.measured_file(seed).is_file())
