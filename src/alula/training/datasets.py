"""The data of a run: the mixture of each stage and the samples of its retention budget, each opened once."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from alula.data import Mixture, MixtureSpec, Quarantine, open_mixture, source_files
from alula.data.samples import Sample
from alula.errors import RecipeError
from alula.training.distillation import questions_of
from alula.training.layout import RunDirectory
from alula.training.methods import METHODS
from alula.training.recipe import DataSpec, Recipe, Stage
from alula.training.retention import ProbeSet, open_probe_set
from alula.training.validation import open_validation

FileState = dict[Path, tuple[int, int] | None]
"""Per file that holds records: bytes and time of the last change, None where it is gone."""


@dataclass(frozen=True)
class StageData:
    """What a stage learns from.

    Attributes:
        mixture: its samples by position, without end.
        steps: optimizer steps until the stage ends.
        quarantine: where bad records go, None where they end the run.
    """

    mixture: Mixture
    steps: int
    quarantine: Quarantine | None


class RunData:
    """Opens what a recipe names when it is first asked for, and keeps it: indexing a large file takes its time.

    Args:
        run: where the stages' quarantines are.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        self.recipe, self.run = recipe, run
        self._stages: dict[int, StageData] = {}
        self._files: dict[int, FileState] = {}

    def stage(self, index: int) -> StageData:
        """The data of stage ``index``.

        Raises:
            DataError: a source that cannot be read. RecipeError: epochs over a source without end, or settings of the
                method that name none of its sources.
        """
        stage = self.recipe.stages[index]
        # a file that was written anew, though with the same content, is to be indexed anew
        if index not in self._stages or self._files[index] != _state(stage.data):
            quarantine = Quarantine(self.run.stage(index, stage).quarantine) if stage.on_bad == "skip" else None
            mixture = open_data(
                stage.data,
                seed=self.recipe.seed + index,
                key=f"stages.{stage.name}.data",
                quarantine=quarantine,
            )
            try:
                METHODS[stage.method].check_sources(stage.settings, [source.name for source in mixture.sources])
            except RecipeError as error:
                where = f"stages.{stage.name}.{error.where}"
                raise RecipeError(error.message, where=where, remedy=error.remedy) from None
            self._stages[index] = StageData(mixture, stage_steps(stage, mixture), quarantine)
            self._files[index] = _state(stage.data)
        return self._stages[index]

    @cached_property
    def retention(self) -> ProbeSet | None:
        """The samples that retention is measured with, None in a recipe without a budget.

        Raises:
            DataError: see `open_probe_set`.
        """
        return None if self.recipe.retention is None else open_probe_set(self.recipe.retention)

    @cached_property
    def validation(self) -> Sequence[Sample]:
        """The held-out samples of the recipe's validation, none in a recipe without.

        Raises:
            DataError: see `open_validation`.
        """
        return [] if self.recipe.validation is None else open_validation(self.recipe.validation)

    def open(self) -> None:
        """Open everything now, so that what cannot be read is refused before anything runs.

        Raises:
            DataError, RecipeError: see `stage`, `retention` and `validation`; questions to distill from that are none.
        """
        for index, stage in enumerate(self.recipe.stages):
            self.stage(index)
            if stage.distill is not None and stage.distill.prompts is not None:
                questions_of(stage.distill.prompts, stage.distill.count, f"stages.{stage.name}.distill.prompts")
        _ = self.retention, self.validation


def open_data(spec: DataSpec, *, seed: int, key: str = "data", quarantine: Quarantine | None = None) -> Mixture:
    """The stage's mixture; relative paths start from the working directory. ``key``: its path in the recipe, for error
    messages."""
    mixture = MixtureSpec(
        sources=list(spec.sources), text_replay=spec.text_replay, seed=seed if spec.seed is None else spec.seed
    )
    return open_mixture(mixture, key=key, quarantine=quarantine)


def _state(spec: DataSpec) -> FileState:
    replay = spec.text_replay.sources if spec.text_replay is not None else ()
    files = [file for source in (*spec.sources, *replay) for file in source_files(source)]
    found = {file: os.stat(file) if os.path.exists(file) else None for file in files}
    return {file: None if status is None else (status.st_size, status.st_mtime_ns) for file, status in found.items()}


def stage_steps(stage: Stage, mixture: Mixture) -> int:
    """Optimizer steps of ``stage``. An epoch draws as many samples as the non-replay sources hold together.

    Raises:
        RecipeError: epochs over a source without end.
    """
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    sizes = {source.name: source.size for source in mixture.sources[: len(stage.data.sources)]}
    endless = [name for name, size in sizes.items() if size is None]
    if endless:
        raise RecipeError(
            f"the source {endless[0]} never ends, so there is no epoch to count",
            where=f"stages.{stage.name}.epochs",
            remedy="give `steps` instead, or set `limit` on the source",
        )
    share = 1.0 - (stage.data.text_replay.ratio if stage.data.text_replay else 0.0)
    samples = stage.epochs * sum(size for size in sizes.values() if size is not None) / share
    return max(1, math.ceil(samples / stage.batch_size))
