"""Running the early-warning study: trainings that are there are read, missing ones are done first."""

from __future__ import annotations

import datetime
from pathlib import Path

from alula.jobs import claim
from alula.training.environment import readable_environment
from alula.training.layout import RunDirectory
from alula.training.metrics import read_rows
from alula.training.retention import read_start
from studies.attention_shift import ShiftRecord, attention_shift
from studies.early_warning.plan import WarningPlan
from studies.early_warning.record import WarningRecord, Watched, judge_all


def early_warning(plan: WarningPlan, *, command: str, workers: int | None = None, quiet: bool = False) -> WarningRecord:
    """Watch the population's trainings (those that are done are only read) and judge the signals.

    Args:
        command: the line that repeats this, for the record.
        workers: processes side by side; by default one per core.
        quiet: draw no progress.

    Returns:
        The record, also written to ``plan.output / "outcome.json"``.

    Raises:
        UsageError: an output directory that holds something else.
    """
    claim(plan.output, plan.facts, "study")
    shifts = finished_population(plan) or attention_shift(
        plan.population, command=command, workers=workers, quiet=quiet
    )
    record = gather(plan, shifts, command=command)
    record.save(plan.output / "outcome.json")
    return record


def finished_population(plan: WarningPlan) -> ShiftRecord | None:
    """The attention-shift study's own record, where it holds just the trainings of the plan."""
    path = plan.population.output / "outcome.json"
    if not path.is_file():
        return None
    found = ShiftRecord.load(path)
    there = [(run.seed, run.text, run.rate) for run in found.runs]
    return found if there == [(run.seed, run.text, run.rate) for run in plan.population.runs] else None


def gather(plan: WarningPlan, shifts: ShiftRecord, *, command: str) -> WarningRecord:
    """Put together what the retention monitor wrote down during the trainings and what became of them."""
    population = plan.population
    runs = []
    for run, known in zip(population.runs, shifts.runs, strict=True):
        recipe = population.recipe_of(run)
        directory = RunDirectory(Path(recipe.output_dir))
        start = read_start(directory.stage(0, recipe.stages[0]))
        assert start is not None  # the population is trained with `retention`
        runs.append(
            Watched.of(
                read_rows(directory.metrics),
                start,
                rate=run.rate,
                text=run.text,
                seed=run.seed,
                base=shifts.bases[run.seed].accuracy["text_bare"],
                final=known.models[max(known.models)].accuracy["text_bare"],
            )
        )
    judged, areas, leads = judge_all(runs, plan.budget)
    return WarningRecord(
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment=readable_environment(),
        settings={**plan.facts, "seeds": list(population.seeds)},
        budget=plan.budget,
        runs=runs,
        judged=judged,
        areas=areas,
        leads=leads,
    )
