"""What the attention-shift study trains and measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from alula.errors import UsageError
from alula.training.recipe import Recipe, Retention
from studies.plan import StudyPlan, scaled

MILESTONES = (40, 80, 160, 240)
WATCHED_EVERY = 10
"""steps between the retention monitor's measurements, which the early-warning study reads"""
_FEWEST_WATCHED = 20
"""text items below which the base might answer none of them"""


@dataclass(frozen=True)
class Run:
    """One training of the population: share of text among its samples, learning rate, seed."""

    seed: int
    text: float
    rate: float

    @property
    def name(self) -> str:
        return f"text-{self.text:g}-rate-{self.rate:g}"

    @property
    def title(self) -> str:
        return f"text {self.text:g}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class ShiftPlan(StudyPlan):
    """The population: every text share with every learning rate, full tuning, measured at each milestone.

    Attributes:
        texts: shares of text samples in training.
        rates: learning rates of decoder and connector.
        items: text questions per task.
        samples: dialogues the attention is measured on.
        task_seed: of the questions and the samples.
    """

    texts: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    items: int = 200
    samples: int = 64
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.runs) < 3:
            raise UsageError("a correlation over runs needs at least three of them", remedy="name more text shares")
        if self.samples < 2 or self.items < 1:
            raise UsageError("at least one question and two samples are needed")

    @property
    def facts(self) -> dict[str, Any]:
        return {
            **super().facts,
            "study": "attention-shift",
            "texts": list(self.texts),
            "rates": list(self.rates),
            "items": self.items,
            "samples": self.samples,
            "task_seed": self.task_seed,
            "watched_every": self.watched_every,
        }

    @property
    def runs(self) -> list[Run]:
        return [Run(seed, text, rate) for seed, text, rate in product(self.seeds, self.texts, self.rates)]

    @property
    def milestones(self) -> tuple[int, ...]:
        """Steps after which each run is measured."""
        return scaled(MILESTONES, self.steps)

    @property
    def watched_every(self) -> int:
        """Steps between two looks of the retention monitor, which only writes down what it sees."""
        return scaled((WATCHED_EVERY,), self.steps)[0]

    def recipe_of(self, run: Run) -> Recipe:
        """The quickstart's full fine-tuning with the run's text share and learning rate."""
        changes: dict[str, Any] = {
            "stages.0.train": {"llm": run.rate, "projector": run.rate},
            "stages.0.save_every": self.milestones[0],
            "stages.0.steps": MILESTONES[-1],
        }
        if run.text:
            changes["stages.0.data.text_replay"] = {"ratio": run.text, "sources": [{"microworld": "text"}]}
        recipe = self.recipe(run.seed, "full", run.name, changes)
        # scaling rounds; the last milestone is the last step
        stage = recipe.stages[0].model_copy(update={"steps": self.milestones[-1]})
        watch = Retention(every=self.watched_every, items=max(self.items, _FEWEST_WATCHED), samples=self.samples)
        return recipe.model_copy(update={"stages": (stage,), "retention": watch})

    def measurements(self, run: Run) -> Path:
        """Where what was measured of a run is kept."""
        return self.output / f"seed-{run.seed}" / "measured" / run.name

    def base_measurement(self, seed: int) -> Path:
        """What was measured of the host before tuning."""
        return self.output / f"seed-{seed}" / "measured" / "base.json"

    def names(self) -> Iterator[str]:
        return (run.title for run in self.runs)
