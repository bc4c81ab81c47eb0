"""What the study of browsing trains and asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alula.bounds import check_count
from alula.jobs import Job
from alula.training import load_recipe, parse_recipe, train
from alula.training.recipe import Recipe
from studies.plan import TunedPlan, logged_steps

ARMS = ("plain", "browse", "staged")
"""the host tuned on questions about several pictures; the same with browse-and-concentrate; in its two stages"""
TOLD = ("own", "none", "others")
"""at test, what the connector is told: the condition of the prompt, none (zeros), that of another question"""
TASKS = ("pictures", "visual")
_RECIPE = Path(__file__).parents[2] / "recipes" / "browse.yaml"
_BATCH, _CAPTIONS = 16, 0.4
_HOST = "host"
_SHAPE = {"width": 96, "layers": 2, "heads": 4, "feedforward": 192}
"""of a connector of queries"""


@dataclass(frozen=True)
class BrowsePlan(TunedPlan):
    """Fully tuned models of a quickstart, or hosts whose connector has queries, tuned on with and without browsing.

    Attributes:
        queries: of the connector, tokens of a picture: such hosts are made, aligned and taught what the questions are
            beforehand. 0: the quickstart's, whose connector has none.
        tuning_steps: optimizer steps of every arm, before the factor `steps`.
        rate: of the condition's map; None: the recipe's.
        items: questions about several pictures, a quarter of each family; a quarter as many about one.
        task_seed: of the questions.
    """

    queries: int = 0
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
        chosen = {"rate": self.rate, "queries": self.queries or None}
        return {
            **super().facts,
            **{name: value for name, value in chosen.items() if value is not None},
            "study": "browse",
            "training": self.tuning_steps,
            "items": self.items,
            "task_seed": self.task_seed,
        }

    def asked(self, task: str) -> int:
        """Questions of a task."""
        return self.items if task == "pictures" else max(1, self.items // 4)

    def model(self, seed: int) -> Path:
        """The model that is tuned on."""
        return self.own.run_directory(seed, _HOST) / "final" if self.queries else super().model(seed)

    def training_jobs(self) -> list[Job]:
        """Trainings of models that are tuned on."""
        if not self.queries:
            return super().training_jobs()
        return [
            Job(
                title=self.training(seed),
                call=train_host,
                arguments=(self, seed),
                size=sum(stage.steps or 0 for stage in self.hosting(seed).stages),
                done=partial(_hosted, self, seed),
            )
            for seed in self.seeds
        ]

    def after_training(self, seed: int) -> tuple[str, ...]:
        return (self.training(seed),) if self.queries else super().after_training(seed)

    def hosting(self, seed: int) -> Recipe:
        """The recipe of a host with queries: its connector learns to see, then all of it what is asked."""

        def stage(name: str, method: str, sources: dict[str, int], **rates: float) -> dict[str, Any]:
            return {
                "name": name,
                "method": method,
                "train": rates,
                "data": {"sources": [{"microworld": source, "weight": weight} for source, weight in sources.items()]},
                "steps": max(1, round(200 * self.steps)),
                "batch_size": 32,
                "log_every": 10,
                "save_every": 200,
            }

        return parse_recipe(
            {
                "name": _HOST,
                "output_dir": str(self.own.run_directory(seed, _HOST)),
                "seed": seed,
                "host": {
                    "llm": "fledgling",
                    "vision": "fledgling",
                    "connector": "queries",
                    "connector_options": {"num_queries": self.queries, **_SHAPE},
                },
                "stages": [
                    stage("align", "projector", {"caption": 1, "visual": 1}, projector=2e-3),
                    stage("taught", "full", {"pictures": 2, "visual": 1}, llm=2e-3, projector=2e-3),
                ],
            }
        )

    def captioning(self, seed: int) -> Path:
        """The adapter of the two stages' arm behind its first, conditioned captions."""
        return self.own.run_directory(seed, "staged") / "stages" / "01-captions" / "model"

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


def train_host(plan: BrowsePlan, seed: int) -> None:
    """Make and train the host of a seed."""
    train(plan.hosting(seed), quiet=True)


def _hosted(plan: BrowsePlan, seed: int) -> int:
    return logged_steps(plan.hosting(seed))


def _without_browsing(stage: Mapping[str, Any]) -> dict[str, Any]:
    train = {part: rate for part, rate in stage["train"].items() if not part.startswith("browse.")}
    return {**{key: value for key, value in stage.items() if key != "browse"}, "method": "full", "train": train}
