"""What all studies share: where they write, the connectors they start from, and recipes with a few things changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from alula.bounds import check_training
from alula.errors import UsageError
from alula.files import read_json
from alula.jobs import Job, lines
from alula.training import train
from alula.training.recipe import Recipe
from alula_fledgling.quickstart import Plan, jobs
from alula_fledgling.quickstart.plan import ALIGN
from alula_fledgling.weights import digest

TUNED = "full"
"""the quickstart's method that tunes all of the decoder"""


@dataclass(frozen=True)
class StudyPlan:
    """A study's settings.

    Attributes:
        output: directory of everything it writes.
        seeds: of training; each repeats the whole.
        steps: factor on all numbers of training steps (tests use a tiny one).
        reuse: directory of a quickstart whose trainings of the same seeds are taken instead of being done again.
    """

    output: Path
    seeds: tuple[int, ...] = (0,)
    steps: float = 1.0
    reuse: Path | None = None

    def __post_init__(self) -> None:
        check_training(self.seeds, self.steps)
        if self.reuse is not None:
            self._check_reuse(self.reuse)

    def _check_reuse(self, directory: Path) -> None:
        mark = directory / "plan.json"
        found = read_json(mark) if mark.is_file() else {}
        if "methods" not in found:
            raise UsageError("holds no quickstart to reuse", where=str(directory))
        for key, value in self.shared_facts.items():
            if found.get(key) != value:
                raise UsageError(
                    f"that quickstart has {key} {found.get(key)}, this study {value}",
                    where=str(directory),
                    remedy=f"give the study the same {key}, or do without --reuse",
                )

    @property
    def shared_facts(self) -> dict[str, Any]:
        """Settings that a quickstart must have as well for its trainings to be the study's."""
        return {"fledgling": digest(), "steps": self.steps}

    @property
    def facts(self) -> dict[str, Any]:
        """The settings that decide what is computed for a seed, as JSON values."""
        return {"fledgling": digest(), "steps": self.steps}

    @cached_property
    def own(self) -> Plan:
        """The quickstart plan whose recipes and layout the study's own trainings use."""
        return Plan(output=self.output, seeds=self.seeds, methods=(), steps=self.steps)

    @cached_property
    def lent(self) -> Plan | None:
        """The quickstart whose trainings are reused."""
        return None if self.reuse is None else Plan(output=self.reuse, steps=self.steps)

    def aligned(self, seed: int) -> Path:
        """The host with a trained connector that the trainings of a seed start from."""
        if self.lent is not None and self.lent.aligned(seed).is_dir():
            return self.lent.aligned(seed)
        return self.own.aligned(seed)

    def recipe(self, seed: int, method: str, name: str, changes: Mapping[str, Any] | None = None) -> Recipe:
        """The packaged recipe of a quickstart method (or "align"), under another name and with some keys changed.

        Args:
            changes: key path -> value, e.g. ``{"stages.0.train.llm": 1e-3}``; a number of steps is scaled like the
                recipe's own.
        """
        overrides = [
            f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in (changes or {}).items()
        ]
        place = [f"output_dir={self.own.run_directory(seed, name)}"]
        if method != ALIGN:
            place.append(f"host.path={self.aligned(seed)}")
        return self.own.recipe(seed, method, [*place, *overrides])

    def align_jobs(self) -> list[Job]:
        """The connectors still to be trained."""
        return [
            Job(
                title=f"{ALIGN}, seed {seed}",
                call=jobs.align,
                arguments=(self.own, seed),
                size=jobs.size_of(self.own, seed, ALIGN, 0),
                done=partial(jobs.progress_of, self.own, seed, ALIGN),
            )
            for seed in self.seeds
            if self.aligned(seed) == self.own.aligned(seed)
        ]

    def after_align(self, seed: int) -> tuple[str, ...]:
        """What a job must come after that needs the connector of ``seed``."""
        return (f"{ALIGN}, seed {seed}",) if self.aligned(seed) == self.own.aligned(seed) else ()


@dataclass(frozen=True)
class MeasuredPlan(StudyPlan):
    """A study that keeps what it measures of a seed in files."""

    def measured(self, seed: int) -> Path:
        """Where what was measured of a seed is kept."""
        return self.own.seed_directory(seed) / "measured"

    def read_measured(self, seed: int, files: Sequence[Path]) -> dict[str, Any]:
        """What those files hold, by their names below `measured`."""
        directory = self.measured(seed)
        return {str(path.relative_to(directory).with_suffix("")): read_json(path) for path in files}


@dataclass(frozen=True)
class TunedPlan(MeasuredPlan):
    """A study of fully tuned models, the quickstart's that see best."""

    def model(self, seed: int) -> Path:
        """The trained model of a seed."""
        return self._holder(seed).run_directory(seed, TUNED) / "final"

    def training_jobs(self) -> list[Job]:
        """Trainings that no lent quickstart has done."""
        missing = [seed for seed in self.seeds if self._holder(seed) is self.own]
        connectors = [job for job in self.align_jobs() if job.arguments[1] in missing]
        return connectors + [
            Job(
                title=self.training(seed),
                call=train_tuned,
                arguments=(self, seed),
                size=self.recipe(seed, TUNED, TUNED).stages[-1].steps or 0,
                done=partial(_trained, self, seed),
                after=self.after_align(seed),
            )
            for seed in missing
        ]

    def after_training(self, seed: int) -> tuple[str, ...]:
        """What a job must come after that needs the model of ``seed``."""
        return (self.training(seed),) if self._holder(seed) is self.own else ()

    def measuring_job(self, seed: int, title: str, measure: Callable[[Any, int], None], files: Sequence[Path]) -> Job:
        """The job that measures a seed's model, which writes the named files one by one."""
        return Job(
            title=f"{title}, seed {seed}",
            call=measure,
            arguments=(self, seed),
            size=len(files),
            done=partial(written_files, tuple(files)),
            after=self.after_training(seed),
        )

    def training(self, seed: int) -> str:
        """Title of the job that trains a seed's model."""
        return f"{TUNED}, seed {seed}"

    def _holder(self, seed: int) -> Plan:
        lent = self.lent
        has = lent is not None and (lent.run_directory(seed, TUNED) / "final").is_dir()
        return lent if lent is not None and has else self.own


def train_tuned(plan: TunedPlan, seed: int) -> None:
    """Train the model of a seed."""
    train(plan.recipe(seed, TUNED, TUNED), quiet=True)


def _trained(plan: TunedPlan, seed: int) -> int:
    return logged_steps(plan.recipe(seed, TUNED, TUNED))


def written_files(files: Sequence[Path]) -> int:
    """How many of these files are there."""
    return sum(path.is_file() for path in files)


def logged_steps(recipe: Recipe) -> int:
    """Steps a training has logged so far."""
    return lines(Path(recipe.output_dir) / "metrics.jsonl") * recipe.stages[-1].log_every


def scaled(steps: Sequence[int], factor: float) -> tuple[int, ...]:
    """Increasing step counts times a factor, each at least one; those that come to the same are one."""
    return tuple(sorted({max(1, round(step * factor)) for step in steps}))
