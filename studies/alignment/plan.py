"""What the alignment study trains and measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alula.errors import UsageError
from alula.training.recipe import Recipe
from alula_fledgling.quickstart.plan import ALIGN
from studies.plan import StudyPlan, scaled

STEPS = 300
MILESTONES = (50, 100, 200, STEPS)
RATE = 2e-3
UNTRAINED_TOWER = "untrained"
"""in a configuration, the vision tower of the fledgling's shape whose weights nobody trained"""


@dataclass(frozen=True)
class Configuration:
    """Tower, connector, and what is trained.

    Attributes:
        host: keys of the recipe's host that differ from the fledgling parts with an MLP between them.
        decoder: the decoder is trained too, at the same rate.
    """

    name: str
    label: str
    host: Mapping[str, Any] = field(default_factory=dict)
    decoder: bool = False


CONFIGURATIONS = (
    Configuration("mlp", "MLP connector"),
    Configuration("linear", "linear connector", {"connector": "linear"}),
    Configuration("queries", "queries connector", {"connector": "queries"}),
    Configuration("last-layer", "tower's last layer", {"feature_layer": -1}),
    Configuration("first-layer", "tower's first layer", {"feature_layer": 1}),
    Configuration("untrained-tower", "untrained tower", {"vision": UNTRAINED_TOWER}),
    Configuration("decoder-tuned", "decoder tuned too", decoder=True),
)
NAMES = tuple(configuration.name for configuration in CONFIGURATIONS)


@dataclass(frozen=True)
class Run:
    """One training of the population."""

    seed: int
    configuration: Configuration

    @property
    def name(self) -> str:
        return self.configuration.name

    @property
    def title(self) -> str:
        return f"{self.configuration.label}, seed {self.seed}"


@dataclass(frozen=True)
class AlignmentPlan(StudyPlan):
    """The population: every configuration with every seed, measured before training and at each milestone.

    Attributes:
        configurations: names of `CONFIGURATIONS`.
        samples: captioned pictures the probes see.
        items: visual questions; there are as many of POPE, and a third as many descriptions for CHAIR.
        task_seed: of samples and questions.
    """

    configurations: tuple[str, ...] = NAMES
    samples: int = 128
    items: int = 240
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.configurations if name not in NAMES]
        if unknown:
            raise UsageError(f"there is no configuration {unknown[0]!r}", remedy=f"choose among {', '.join(NAMES)}")
        if len(self.runs) < 3:
            raise UsageError("a correlation over runs needs at least three of them", remedy="name more seeds")
        if self.samples < 4 or self.items < 3:
            raise UsageError("at least four samples and three questions are needed")

    @property
    def facts(self) -> dict[str, Any]:
        return {
            **super().facts,
            "study": "alignment",
            "configurations": list(self.configurations),
            "samples": self.samples,
            "items": self.items,
            "task_seed": self.task_seed,
        }

    @property
    def runs(self) -> list[Run]:
        chosen = [one for one in CONFIGURATIONS if one.name in self.configurations]
        return [Run(seed, configuration) for configuration in chosen for seed in self.seeds]

    @property
    def milestones(self) -> tuple[int, ...]:
        """Steps after which each run is measured."""
        return scaled(MILESTONES, self.steps)

    @property
    def untrained_tower(self) -> Path:
        """Where the tower that nobody trained is."""
        return self.output / "untrained-tower"

    def recipe_of(self, run: Run) -> Recipe:
        """The quickstart's align recipe on captions and questions, with the run's parts."""
        configuration = run.configuration
        host = dict(configuration.host)
        if host.get("vision") == UNTRAINED_TOWER:
            host["vision"] = str(self.untrained_tower)
        rates = {"projector": RATE, **({"llm": RATE} if configuration.decoder else {})}
        changes = {
            **{f"host.{key}": value for key, value in host.items()},
            "stages.0.method": "full" if configuration.decoder else "projector",
            "stages.0.train": rates,
            "stages.0.data.sources": [
                {"microworld": "caption", "split": "train"},
                {"microworld": "visual", "split": "train"},
            ],
            "stages.0.save_every": self.milestones[0],
        }
        recipe = self.recipe(run.seed, ALIGN, run.name, changes)
        # scaling rounds; the last milestone is the last step
        stage = recipe.stages[0].model_copy(update={"steps": self.milestones[-1]})
        return recipe.model_copy(update={"stages": (stage,)})

    def measurements(self, run: Run) -> Path:
        """Where what was measured of a run is kept."""
        return self.output / f"seed-{run.seed}" / "measured" / run.name
