"""Running the study on real weights: align, then arm by arm train and measure."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from alula.files import read_json
from alula.jobs import Job, run_in
from studies.plan import logged_steps, written_files
from studies.population import measurement
from studies.real.measure import align, look_away, look_in, measure, tune
from studies.real.pictures import blind, held_out
from studies.real.plan import BASE, PROBED, RealPlan
from studies.real.record import RealRecord
from studies.real.words import read_blimp
from studies.records import origin


def real(
    plan: RealPlan, *, command: str, join: Path | None = None, workers: int | None = None, quiet: bool = False
) -> RealRecord:
    """Align one host of real weights, tune it by every arm, measure all.

    Finished work is not done again; arms and seeds may be added later.

    Args:
        join: record of other seeds, which were made elsewhere with the same settings; they stand beside these.

    Raises:
        UsageError: a record that cannot be joined.
    """
    other = None if join is None else RealRecord.load(join)
    if other is not None:  # before hours of work
        other.refuse_unlike({**plan.facts, "seeds": list(plan.seeds)}, _labels(plan), str(join))
    seconds = run_in(
        plan.output, plan.facts, "study", list(_jobs(plan)), label="real weights", workers=workers, quiet=quiet
    )
    record = gather(plan, command=command, seconds=seconds)
    if other is not None:
        record = record.joined(other, str(join))
    record.save(plan.output / "outcome.json")
    return record


def gather(plan: RealPlan, *, command: str, seconds: float) -> RealRecord:
    """The record of what is there."""
    names = [BASE, *(arm.name for arm in plan.chosen)]
    return RealRecord(
        **origin(command, seconds),
        settings={**plan.facts, "seeds": list(plan.seeds)},
        labels=_labels(plan),
        phenomena={each.name: each.phenomenon for each in read_blimp(plan.benchmarks, 1)},
        blind=blind(plan.data("easy-vqa", "train"), held_out(plan.real, plan.items).shapes),
        measured={
            str(seed): {
                name: {
                    **_without_words(read_json(plan.measured(seed, name))),
                    "sight": read_json(plan.sight(seed, name)),
                }
                for name in names
            }
            for seed in plan.seeds
        },
        on_the_way={
            str(seed): {
                name: {
                    str(step): read_json(measurement(plan.on_the_way(seed, name), step))
                    for step in ((0,) if name == BASE else plan.milestones)
                    if measurement(plan.on_the_way(seed, name), step).is_file()
                }
                for name in names
            }
            for seed in plan.seeds
        },
        inside={
            str(seed): {
                name: read_json(plan.inside(seed, name)) for name in PROBED if plan.inside(seed, name).is_file()
            }
            for seed in plan.seeds
        },
    )


def _labels(plan: RealPlan) -> dict[str, str]:
    """The models' names for people, the base first."""
    return {BASE: "base", **{arm.name: arm.label for arm in plan.chosen}}


def _without_words(measured: dict[str, Any]) -> dict[str, Any]:
    found = dict(measured)
    for task, key in (("captions", "said"), ("formats", "answers")):
        found[task] = {name: value for name, value in measured[task].items() if name != key}
    return found


def _jobs(plan: RealPlan) -> Iterator[Job]:
    for seed in plan.seeds:
        aligned = f"connector, seed {seed}"
        recipe = plan.align_recipe(seed)
        yield Job(aligned, align, (plan, seed), plan.align, partial(logged_steps, recipe))
        yield from _measuring(plan, seed, BASE, aligned)
        for arm in plan.chosen:
            trained = f"{arm.name}, seed {seed}"
            yield Job(
                trained,
                tune,
                (plan, seed, arm.name),
                plan.training,
                partial(logged_steps, plan.recipe_of(seed, arm)),
                (aligned,),
            )
            yield from _measuring(plan, seed, arm.name, trained)


def _measuring(plan: RealPlan, seed: int, name: str, after: str) -> Iterator[Job]:
    for title, call, path in (
        ("measuring", measure, plan.measured(seed, name)),
        ("behind other pictures", look_away, plan.sight(seed, name)),
        ("inside", look_in, plan.inside(seed, name)),
    ):
        if call is not look_in or name in PROBED:
            yield Job(
                f"{title} {name}, seed {seed}", call, (plan, seed, name), 1, partial(written_files, [path]), (after,)
            )
