"""What the study of demonstrations trains and measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.bounds import check_count
from alula.training import parse_recipe
from alula.training.recipe import Recipe
from studies.plan import TunedPlan

WAYS = ("full", "pruned", "text", "aim")
"""pictures and words; pictures pooled to a fifth of their tokens by a policy; words alone; fused tokens"""
SHOTS = (0, 1, 3, 6, 12, 32, 64)
"""64 pictures are more than the host's context holds"""
KEPT = 5
"""image tokens that are left of the 25 of a pruned picture"""
FAMILY = "colour"
BATCH = 8


@dataclass(frozen=True)
class DemonstrationsPlan(TunedPlan):
    """Fully tuned models that learn to read demonstrations, each with a map that AIM trains.

    Attributes:
        shots: numbers of demonstrations that episodes are asked behind, from 0 on.
        items: held-out episodes that are asked.
        taught: steps in which the host learns from episodes; times `steps`.
        mapped: steps in which the map learns; times `steps`.
        task_seed: of the episodes.
    """

    shots: tuple[int, ...] = SHOTS
    items: int = 32
    taught: int = 40
    mapped: int = 240
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("items", "taught", "mapped"):
            check_count(getattr(self, name), name)

    @property
    def facts(self) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in ("items", "taught", "mapped", "task_seed")}
        return {**super().facts, "study": "demonstrations", "shots": list(self.shots), "kept": KEPT, **told}

    def recipe_of(self, seed: int) -> Recipe:
        """Two stages: the host learns from episodes, then the map learns on the frozen host."""

        def stage(name: str, method: str, train: dict[str, float], steps: int, **more: Any) -> dict[str, Any]:
            return {
                "name": name,
                "method": method,
                "train": train,
                "steps": max(1, round(steps * self.steps)),
                "batch_size": BATCH,
                "save_every": 50,
                "log_every": 5,
                **more,
            }

        episodes = {"microworld": "episode", "families": [FAMILY]}
        taught = stage(
            "episodes", "full", {"llm": 1.5e-3, "projector": 1.5e-3}, self.taught, data={"sources": [episodes]}
        )
        mapped = stage("map", "aim", {"aim": 2e-3}, self.mapped, data={"sources": [{**episodes, "seed": 1}]})
        return parse_recipe(
            {
                "name": f"demonstrations-{seed}",
                "output_dir": str(self.own.run_directory(seed, "aim")),
                "seed": seed,
                "host": {"path": str(self.model(seed))},
                "stages": [taught, mapped],
            }
        )

    def adapter(self, seed: int) -> Path:
        """The trained map of a seed, on its host."""
        return self.own.run_directory(seed, "aim") / "final"

    @property
    def shown(self) -> Path:
        """Where episodes to look at are kept, as the first seed answers them."""
        return self.own.seed_directory(self.seeds[0]) / "shown.json"

    def measured_file(self, seed: int) -> Path:
        """Where what was measured of a seed is kept."""
        return self.own.seed_directory(seed) / "demonstrations.json"
