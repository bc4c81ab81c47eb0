"""The plan of the frontier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from alula.training.recipe import Recipe
from studies.arms import Ablation, Arm, ArmsPlan
from studies.frontier.arms import FRONTIER


@dataclass(frozen=True)
class FrontierPlan(ArmsPlan):
    """The frontier of words against sight.

    Attributes:
        rounds: in which each arm's training time is measured beside full tuning's.
    """

    ablation: ClassVar[Ablation] = FRONTIER

    rounds: int = 3

    def recipe_of(self, seed: int, arm: Arm) -> Recipe:
        """As `ArmsPlan.recipe_of`; all arms that are held to the words of one base share what it said."""
        cache = {"stages.0.distill.cache": str(self.output / "distillation")} if arm.group == "distill" else {}
        return self.recipe(seed, arm.recipe, arm.name, {**arm.changes, **cache})

    def trained(self, seed: int, name: str) -> Path:
        """The trained model of an arm."""
        return self.holder(seed, name).run_directory(seed, name) / "final"

    def divergence_path(self, seed: int, name: str) -> Path:
        """What was measured of an arm's divergence from the base."""
        return self.own.seed_directory(seed) / f"{name}-divergence.json"

    def later_path(self, seed: int, name: str) -> Path:
        """What a model, an arm's or the base, answered to visual questions a turn later."""
        return self.own.seed_directory(seed) / f"{name}-later.json"

    def costs_path(self, name: str) -> Path:
        """What was measured of an arm's training time."""
        return self.output / "costs" / f"{name}.json"
