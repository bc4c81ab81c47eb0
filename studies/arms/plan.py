"""What an ablation trains and asks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from alula.errors import UsageError
from alula.training.recipe import Recipe
from alula_fledgling.quickstart import Plan, jobs
from alula_fledgling.quickstart.plan import BASE
from studies.arms.ablation import Ablation, Arm
from studies.plan import StudyPlan


@dataclass(frozen=True)
class ArmsPlan(StudyPlan):
    """An ablation's settings. A study's own plan names its `ablation`.

    Attributes:
        arms: names of the ablation's arms; with none, all.
        items: questions per task.
        task_seed: of the questions.
    """

    ablation: ClassVar[Ablation]

    arms: tuple[str, ...] = ()
    items: int = 400
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.ablation.names
        unknown = [name for name in self.arms if name not in names]
        if unknown:
            raise UsageError(f"there is no arm {', '.join(unknown)!r}", remedy=f"choose among {', '.join(names)}")

    @property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "study": self.ablation.name, "items": self.items, "task_seed": self.task_seed}

    @property
    def shared_facts(self) -> dict[str, Any]:
        return {**super().shared_facts, "items": self.items, "task_seed": self.task_seed}

    @cached_property
    def own(self) -> Plan:
        return Plan(
            output=self.output,
            seeds=self.seeds,
            methods=(),
            items=self.items,
            task_seed=self.task_seed,
            tasks=self.ablation.tasks,
            steps=self.steps,
        )

    @property
    def chosen(self) -> list[Arm]:
        """The arms, in the ablation's order."""
        return [arm for arm in self.ablation.arms if not self.arms or arm.name in self.arms]

    def recipe_of(self, seed: int, arm: Arm) -> Recipe:
        """The recipe of an arm."""
        return self.recipe(seed, arm.recipe, arm.name, arm.changes)

    def holder(self, seed: int, name: str) -> Plan:
        """The plan that holds the training and the answers called ``name``: the lent quickstart's, or the study's."""
        lent = self.lent
        same = name == BASE or any(arm.name == name and not arm.changes for arm in self.ablation.arms)
        if lent is not None and same and jobs.answers_path(lent, seed, name).is_file():
            return lent
        return self.own
