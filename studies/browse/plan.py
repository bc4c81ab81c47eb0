"""What the study of browsing trains and asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.bounds import check_count
from alula.training import load_recipe
from alula.training.recipe import Recipe
from studies.plan import TunedPlan

ARMS = ("plain", "browse", "staged")
"""the host tuned on questions about several pictures; the same with browse-and-concentrate; in its two stages"""
TOLD = ("own", "none", "others")
"""at test, what the connector is told: the condition of the prompt, none (zeros), that of another question"""
TASKS = ("pictures", "visual")
_RECIPE = Path(__file__).parents[2] / "recipes" / "browse.yaml"
_BATCH, _CAPTIONS = 16, 0.4


@dataclass(frozen=True)
class BrowsePlan(TunedPlan):
    """Fully tuned models of a quickstart, tuned on with and without browsing.

    Attributes:
        tuning_steps: optimizer steps of every arm, before the factor `steps`.
        rate: of the condition's map; None: the recipe's.
        items: questions about several pictures, a quarter of each family; a quarter as many about one.
        task_seed: of the questions.
    """

    tuning_steps: int = 150
    rate: float | None = None
    items: int = 200
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.items, "items")
        check_count(self.tuning_steps, "training")

    @property
    def facts(self) -> dict[str, Any]:
        rate = {} if self.rate is None else {"rate": self.rate}
        return {
            **super().facts,
            **rate,
            "study": "browse",
            "training": self.tuning_steps,
            "items": self.items,
            "task_seed": self.task_seed,
        }

    def asked(self, task: str) -> int:
        """Questions of a task."""
        return self.items if task == "pictures" else max(1, self.items // 4)

    def tuning(self, seed: int, arm: str) -> Recipe:
        """The recipe of an arm: the same data, rates and number of steps."""
        count = max(2, round(self.tuning_steps * self.steps))
        captions = max(1, round(_CAPTIONS * count))
        changes = {
            "host.path": self.model(seed),
            "output_dir": self.own.run_directory(seed, arm),
            "seed": seed,
            "stages.captions.steps": captions,
            "stages.captions.batch_size": _BATCH,
            "stages.answers.steps": count - captions if arm == "staged" else count,
            "stages.answers.batch_size": _BATCH,
        }
        recipe = load_recipe(_RECIPE, [f"{key}={value}" for key, value in changes.items()])
        told: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True)
        if self.rate is not None:
            for stage in told["stages"]:
                stage["train"] = {**stage["train"], "browse.condition": self.rate}
        if arm != "staged":
            (stage,) = (stage for stage in told["stages"] if stage["name"] == "answers")
            told["stages"] = [_without_browsing(stage) if arm == "plain" else {**stage, "browse": {}}]
        return Recipe.model_validate(told)


def _without_browsing(stage: Mapping[str, Any]) -> dict[str, Any]:
    train = {part: rate for part, rate in stage["train"].items() if not part.startswith("browse.")}
    return {**{key: value for key, value in stage.items() if key != "browse"}, "method": "full", "train": train}
