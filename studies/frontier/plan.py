"""The plan of the frontier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from studies.arms import Ablation, ArmsPlan
from studies.frontier.arms import FRONTIER, PLAIN


@dataclass(frozen=True)
class FrontierPlan(ArmsPlan):
    """The frontier of words against sight.

    Attributes:
        rounds: in which each arm's training time is measured beside full tuning's.
    """

    ablation: ClassVar[Ablation] = FRONTIER

    # `tokens: both` and `distill` are not in recipes yet
    arms: tuple[str, ...] = tuple(arm.name for arm in PLAIN if arm.name != "experts-both")

    rounds: int = 3

    def trained(self, seed: int, name: str) -> Path:
        """The trained model of an arm."""
        return self.holder(seed, name).run_directory(seed, name) / "final"

    def divergence_path(self, seed: int, name: str) -> Path:
        """What was measured of an arm's divergence from the base."""
        return self.own.seed_directory(seed) / f"{name}-divergence.json"

    def costs_path(self, name: str) -> Path:
        """What was measured of an arm's training time."""
        return self.output / "costs" / f"{name}.json"
