"""What the study of truthfulness trains and asks, and where it keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.errors import UsageError
from alula.training.recipe import Recipe
from studies.plan import StudyPlan
from studies.truthfulness.arms import ARMS, Arm


@dataclass(frozen=True)
class TruthPlan(StudyPlan):
    """The study's settings.

    Attributes:
        arms: names of `ARMS`; with none, all.
        items: questions per task.
        task_seed: of the questions; the same for all models.
    """

    arms: tuple[str, ...] = ()
    items: int = 120
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [arm.name for arm in ARMS]
        if unknown := [name for name in self.arms if name not in names]:
            raise UsageError(f"there is no arm {', '.join(unknown)!r}", remedy=f"choose among {', '.join(names)}")

    @property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "study": "truthfulness", "items": self.items, "task_seed": self.task_seed}

    @property
    def chosen(self) -> list[Arm]:
        """The arms, in the order of tables."""
        return [arm for arm in ARMS if not self.arms or arm.name in self.arms]

    def recipe_of(self, seed: int, arm: Arm) -> Recipe:
        """The recipe of an arm."""
        return self.recipe(seed, arm.recipe, arm.name, arm.changes)

    def trained(self, seed: int, arm: Arm) -> Path:
        """An arm's model."""
        return self.own.run_directory(seed, arm.name) / "final"

    def answers(self, seed: int, name: str) -> Path:
        """What an arm, or the base, was found to hold likely."""
        return self.own.seed_directory(seed) / f"{name}-truthfulness.json"
