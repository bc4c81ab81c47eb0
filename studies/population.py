"""A training that is measured on its way: one run gives a model per milestone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alula.files import read_json, write_json
from alula.seam import evaluating
from alula.training import train
from alula.training.recipe import Recipe

Measure = Callable[[Any], dict[str, Any]]
"""a model -> what is to be known of it, as JSON values"""


def train_measured(recipe: Recipe, milestones: Sequence[int], directory: Path, measure: Measure) -> Path:
    """Train, and measure the model after each milestone step into ``directory``; returns the trained model's directory.

    A milestone is measured before the checkpoint of its step is written, so a run that was killed passes each
    unmeasured milestone again.
    """
    watch = Milestones(milestones, directory, measure)
    return train(recipe, callbacks=[watch], quiet=True).final


def measurement(directory: Path, step: int) -> Path:
    """Where the measurement of a milestone is."""
    return directory / f"step-{step}.json"


def measured(directory: Path, milestones: Sequence[int]) -> int:
    """How many milestones have been measured."""
    return sum(measurement(directory, step).is_file() for step in milestones)


def read_measurement(directory: Path, step: int) -> dict[str, Any]:
    """What was measured at a milestone."""
    return read_json(measurement(directory, step))


class Milestones(TrainerCallback):
    """Measures the model in training after chosen steps, each once."""

    def __init__(self, steps: Sequence[int], directory: Path, measure: Measure) -> None:
        self.steps, self.directory, self.measure = frozenset(steps), directory, measure

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        path = measurement(self.directory, state.global_step)
        if state.global_step in self.steps and not path.is_file():
            with evaluating(kwargs["model"]), own_precision(kwargs["model"]):
                write_json(path, self.measure(kwargs["model"]))


@contextlib.contextmanager
def own_precision(model: Any) -> Iterator[None]:
    """Inside, a model in training computes in the precision of its weights, as it will when it is loaded again.

    accelerate puts the autocast of mixed precision around an instance's `forward`; it is set aside for the block.
    """
    wrapped = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped
