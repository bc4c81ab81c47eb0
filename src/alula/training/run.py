"""A whole run: stages in order, each from the last one's output, resumable at any moment."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alula.errors import RecipeError, UsageError
from alula.files import write_text
from alula.training.datasets import RunData
from alula.training.defaults import with_questions
from alula.training.environment import append_session, describe_environment
from alula.training.feasibility import check_feasible
from alula.training.inputs import check_same_data, record_data
from alula.training.layout import RunDirectory
from alula.training.methods import METHODS
from alula.training.notation import read_yaml
from alula.training.processes import on_first
from alula.training.progress import Display
from alula.training.reading import dump_recipe, load_recipe, parse_recipe
from alula.training.recipe import Recipe
from alula.training.records import ReadSource, read_sources
from alula.training.stage import StagePlan, StageResult, run_stage, stage_result
from alula.training.starts import assemble
from alula.training.validation import Evaluation, check_names

Resume = Literal["auto"] | bool
# settings that change what a run writes down, not what it computes
_FREE_KEYS = ("output_dir", "validation", "report_to")  # a run may have been moved
_FREE_STAGE_KEYS = ("log_every", "save_every", "keep_checkpoints", "workers")


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    directory: Path
    final: Path
    stages: tuple[StageResult, ...]
    is_main: bool = True

    @property
    def was_done(self) -> bool:
        """Whether there was nothing left to do."""
        return all(stage.skipped for stage in self.stages)

    @property
    def stopped(self) -> str | None:
        """Why the retention budget ended the run early, None if it did not."""
        return self.stages[-1].stopped

    def as_json(self) -> dict[str, Any]:
        """Paths as strings, everything else as it is."""
        return json.loads(json.dumps(asdict(self), default=str))


def train(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    *,
    resume: Resume = "auto",
    callbacks: Sequence[TrainerCallback] = (),
    evaluations: Sequence[Evaluation] = (),
    quiet: bool = False,
) -> TrainResult:
    """Run a recipe. Under `torchrun` or `accelerate launch` every process calls this alike.

    Args:
        recipe: a Recipe, the path of one, or the mapping a YAML file would hold.
        resume: "auto" goes on where an earlier session of the same recipe stopped; True insists that there is one;
            False starts over. What is there goes once the new run has something to go on from, its first checkpoint or
            finished stage; one that ends sooner, as with bad data or by an interrupt, leaves it as it was.
        callbacks: Trainer callbacks for every stage (`TrainerControl` may stop one).
        evaluations: of your own, made while every stage trains; what they find stands in the rows of ``metrics.jsonl``.
        quiet: say nothing on stderr.

    Raises:
        RecipeError: the recipe does not say something runnable.
        UsageError: the output directory holds another recipe's run, one that began with other data, something else, or
            is in use.
        DataError, HostError: data or models that cannot be used.
    """
    check_names(evaluations)
    recipe = with_questions(as_recipe(recipe))
    processes = PartialState(cpu=recipe.device == "cpu" or not torch.cuda.is_available())
    check_world(recipe, processes.num_processes)
    run = RunDirectory(Path(recipe.output_dir))
    data = RunData(recipe, run)
    display = Display(quiet=quiet or not processes.is_main_process)
    with contextlib.ExitStack() as stack:
        if processes.is_main_process:
            stack.enter_context(run.locked())
            stack.enter_context(earlier_kept(run, display))
            prepare(run, recipe, data, resume=resume, processes=processes.num_processes, display=display)
        processes.wait_for_everyone()
        results = run_stages(recipe, run, data, display, (_LettingGo(run), *callbacks), evaluations)
        on_first(lambda: run.link(run.final, results[-1].model))
    return TrainResult(run.root, run.final, tuple(results), is_main=processes.is_main_process)


def run_stages(
    recipe: Recipe,
    run: RunDirectory,
    data: RunData,
    display: Display,
    callbacks: Sequence[TrainerCallback],
    evaluations: Sequence[Evaluation],
) -> list[StageResult]:
    """Train the stages that are not done, each from the output of the one before, until one is stopped."""
    results: list[StageResult] = []
    origin = base = start_of_run(recipe, run)
    previous = None
    for index, stage in enumerate(recipe.stages):
        plan = StagePlan(recipe, index, run, origin, base, previous)
        paths = plan.paths
        if paths.done() is not None:
            results.append(stage_result(paths, skipped=True))
            display.notify(f"stage {stage.name}: done already, skipped")
        else:
            if results:  # days may have passed
                on_first(partial(check_same_data, run, recipe, [index]))
            results.append(run_stage(plan, data, display, callbacks, evaluations))
            on_first(run.let_go)
        on_first(partial(run.link, run.latest, paths.model))
        if results[-1].stopped is not None:
            display.notify(f"stopped: {results[-1].stopped}")
            break
        if METHODS[stage.method].leaves_adapter:
            previous = paths.model
            base = str(paths.host) if paths.host.is_dir() else base
        else:
            base = str(paths.model)
    return results


def check(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    *,
    resume: Resume = "auto",
    told: Callable[[ReadSource], object] | None = None,
) -> Recipe:
    """Validate a recipe, read its models' configurations and records of its data, training nothing.

    Of every source, and of what the run is measured with, at most a thousand records are read, with their media, spread
    evenly over it. What it does not look at: weights, how many tokens records come to, whether the host takes their
    media, and the other records (`alula data check` reads them all).

    Args:
        resume: as `train` would be told.
        told: called with what was read of each source.

    Raises:
        RecipeError, HostError, DataError, UsageError: as `train` would.
    """
    recipe = as_recipe(recipe)
    check_feasible(recipe)
    recipe = with_questions(recipe)
    run = RunDirectory(Path(recipe.output_dir))
    run.check_ownership()
    if resume is not False:
        there = run.to_go_on_from()
        if there.holds_a_run() and there.has_begun():
            check_same_recipe(there, recipe)
            if there.data.exists():
                check_same_data(there, recipe, stages_left(there, recipe))
        elif resume is True and not there.holds_a_run():
            raise nothing_to_resume(run)
    data = RunData(recipe, run)
    data.open()
    for found in read_sources(recipe, data):
        if told is not None:
            told(found)
    return recipe


@contextlib.contextmanager
def earlier_kept(run: RunDirectory, display: Display) -> Iterator[None]:
    """Inside, a run may be set aside to start over; it comes back if the block ends before anything was learned."""

    def settle() -> None:
        if run.settle():
            display.notify(
                f"the run that started over had no checkpoint yet: {run.root} holds the earlier one as it was"
            )

    settle()  # what a kill left
    try:
        yield
    except BaseException:
        settle()
        raise


class _LettingGo(TrainerCallback):
    """Removes the run that was set aside once there is a checkpoint to go on from."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        on_first(self.run.let_go)


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str]) -> Recipe:
    """A Recipe from any form of one."""
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)


def check_world(recipe: Recipe, processes: int) -> None:
    """Raise a RecipeError if a stage's batch cannot be dealt out evenly to ``processes``."""
    for stage in recipe.stages:
        share = stage.batch_size / processes
        micro = stage.micro_batch_size or share
        if share != int(share) or share % micro:
            raise RecipeError(
                f"{stage.batch_size} samples do not divide into micro-batches of {micro:g} on {processes} processes",
                where=f"stages.{stage.name}.batch_size",
                remedy="batch_size must be a multiple of processes x micro_batch_size",
            )


def prepare(
    run: RunDirectory, recipe: Recipe, data: RunData, *, resume: Resume, processes: int, display: Display
) -> None:
    """Decide what the output directory is to this session, and write down what is about to run."""
    run.check_ownership()
    if run.holds_a_run():
        if resume is False:
            if run.has_begun():
                display.notify(
                    "starting over: the earlier run goes with the first checkpoint of the new one (save_every: "
                    f"{recipe.stages[0].save_every} steps) or its first finished stage, and is back if it ends sooner"
                )
            run.set_aside()
        elif run.has_begun():
            check_same_recipe(run, recipe)
        elif recipe_difference(run, recipe) is not None:  # nothing has been learned by it
            run.clear()
            display.notify("nothing was trained by the recipe as it was: the run begins with what it is now")
    elif resume is True:
        raise nothing_to_resume(run)
    if not run.holds_a_run():
        # refused now, it leaves no directory behind that belongs to it
        check_feasible(recipe)
        data.open()
    run.clean_partials()
    left = stages_left(run, recipe)
    begun = run.has_begun()
    if begun and run.data.exists():
        check_same_data(run, recipe, left)
    seeds = {stage.name: recipe.seed + index for index, stage in enumerate(recipe.stages)}
    write_text(run.recipe, dump_recipe(recipe))
    if left and not (begun and run.data.exists()):
        record_data(run, recipe, left)
        if begun:
            display.notify("the run does not say what its data were when it began: whether they changed is not known")
    append_session(run.environment, describe_environment(processes, seeds))
    if recipe.host.path is None:
        assemble(recipe.host, run.host, seed=recipe.seed)


def stages_left(run: RunDirectory, recipe: Recipe) -> list[int]:
    """The stages that are not done, by number."""
    return [index for index, stage in enumerate(recipe.stages) if run.stage(index, stage).done() is None]


def nothing_to_resume(run: RunDirectory) -> UsageError:
    """What is said where a run is insisted on."""
    return UsageError("there is no run to resume", where=str(run.root), remedy="leave --resume out")


def start_of_run(recipe: Recipe, run: RunDirectory) -> str:
    """The host under the first stage."""
    return recipe.host.path if recipe.host.path is not None else str(run.host)


def check_same_recipe(run: RunDirectory, recipe: Recipe) -> None:
    """Raise a UsageError if the run on disk was another recipe's, naming the first key that differs."""
    difference = recipe_difference(run, recipe)
    if difference is not None:
        key, old, new = difference
        raise UsageError(
            f"holds a run of another recipe: {key} was {old!r}, now {new!r}",
            where=str(run.root),
            remedy="name another output_dir, or start over with --no-resume (drops what is there)",
        )


def recipe_difference(run: RunDirectory, recipe: Recipe) -> tuple[str, Any, Any] | None:
    """The first key in which the recipe of the run on disk differs, with both values; None where none does.

    Keys that change nothing of what is computed do not count.
    """
    before, now = (
        read_yaml(text, where=str(run.recipe))[0]
        for text in (run.recipe.read_text(encoding="utf-8"), dump_recipe(recipe))
    )
    if not isinstance(before, dict) or not isinstance(before.get("stages"), list):
        raise UsageError(
            "holds no recipe any more",
            where=str(run.recipe),
            remedy="restore it, or start over with --no-resume (drops the run that is there)",
        )
    before = _of_today(before)
    for plain in (before, now):
        for key in _FREE_KEYS:
            plain.pop(key, None)
        for stage in plain["stages"]:
            for key in _FREE_STAGE_KEYS:
                stage.pop(key, None)
    return first_difference(before, now)


def _of_today(plain: dict[str, Any]) -> dict[str, Any]:
    """A written recipe as it would be written now: settings that came later have their defaults."""
    host = plain.get("host")
    if isinstance(host, dict) and host.get("path") is not None:  # earlier versions wrote defaults beside it
        plain = {**plain, "host": {"path": host["path"]}}
    try:
        return read_yaml(dump_recipe(parse_recipe(plain)), where="recipe")[0]
    except RecipeError:
        return plain


def first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key path at which two plain values differ, with both values there."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            found = first_difference(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
            if found is not None:
                return found
        return None
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            found = first_difference(old, new, f"{key}.{index}")
            if found is not None:
                return found
        return None
    return None if before == now else (key, before, now)
