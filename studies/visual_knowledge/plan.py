"""What the study of visual knowledge trains and asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.bounds import check_count
from alula.errors import UsageError
from alula.training.recipe import Recipe
from studies.plan import StudyPlan
from studies.visual_knowledge.arms import ARMS, BEFORE, Arm, constants


@dataclass(frozen=True)
class KnowledgePlan(StudyPlan):
    """Arms that start from one connector per seed; each seed has a world of named things of its own.

    Attributes:
        arms: names of `ARMS`; with none, all.
        items: questions of the old text skills.
        task_seed: of those.
    """

    arms: tuple[str, ...] = ()
    items: int = 80
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.items, "items")
        names = [arm.name for arm in ARMS]
        if unknown := [name for name in self.arms if name not in names]:
            raise UsageError(f"there is no arm {unknown[0]!r}", remedy=f"choose among {', '.join(names)}")

    @property
    def facts(self) -> dict[str, Any]:
        own = {"study": "visual-knowledge", "items": self.items, "task_seed": self.task_seed, "trained": constants()}
        return {**super().facts, **own}

    @property
    def chosen(self) -> list[Arm]:
        """The arms, in the study's order."""
        return [arm for arm in ARMS if not self.arms or arm.name in self.arms]

    def recipe_of(self, seed: int, arm: Arm) -> Recipe:
        """The recipe of an arm."""
        return self.recipe(seed, "full", arm.name, {"stages": arm.stages(seed), "name": f"visual-knowledge-{arm.name}"})

    def model(self, seed: int, name: str) -> Path:
        """The trained model of an arm, or the one before."""
        return self.aligned(seed) if name == BEFORE else self.own.run_directory(seed, name) / "final"

    def measured(self, seed: int, name: str) -> Path:
        """The file of what was measured of an arm, or of the model before."""
        return self.own.seed_directory(seed) / "measured" / f"{name}.json"
