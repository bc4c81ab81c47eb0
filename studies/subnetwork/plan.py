"""What the study of subnetworks prunes, asks and heals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alula.bounds import check_count
from alula.errors import UsageError
from alula.evaluation import Task
from alula.jobs import Job
from alula.training import load_recipe, train
from alula.training.recipe import Recipe
from alula_fledgling.tasks import skills
from studies.plan import TunedPlan, logged_steps

PARTS = ("masks", "healing", "kinds")
"""pictures and words under masks; a pruned model trained again; models that take films and sounds, too"""
CALIBRATIONS = ("both", "image", "words", "padded", "magnitude", "random")
"""what masks are found by: all tokens of pictures' and of text prompts; image tokens; prompts of text alone; as both,
with the padding of the published code; no data; chance"""
TASKS = ("caption", "visual", "dialogue", "text")
"""streams of the microworld, each a task of the alpha-SubNet"""
RULES = ("intersection", "pooled", "magnitude", "random", "majority", "union")
"""one mask for all tasks: kept by all of them; its rivals of the same sparsity; and the milder rules"""
HEALINGS = ("visual", "both")
"""what is trained on, after pruning and without: questions about pictures, or half of them text"""
LOOKED = 0.5
"""the sparsity at which masks are compared and tasks share"""


@dataclass(frozen=True)
class Kind:
    """A kind of tokens.

    Attributes:
        stream: of the microworld, whose prompts hold them.
        task: of `alula_fledgling.tasks.skills`, which asks for the skill.
        families: of questions, where not all are learned in so few steps (recipes/four-kinds.yaml).
    """

    stream: str
    task: Callable[..., Task]
    families: tuple[str, ...] | None = None


KINDS = {
    "image": Kind("visual", skills.visual),
    "video": Kind("film", skills.film, ("mover", "number", "presence")),
    "audio": Kind("sound", skills.sound),
    "text": Kind("text", skills.text_bare),
}
"""by name, which is that of the set of its tokens (`alula.probes.token_sets`)"""
MATCHED = ("intersection", "pooled", "magnitude")
"""the rules that four kinds are asked under at every sparsity; the others at `LOOKED`"""
RECIPES = Path(__file__).parents[2] / "recipes"
_FOUR = "four-kinds"


@dataclass(frozen=True)
class SubnetworkPlan(TunedPlan):
    """Trained models without some of their weights.

    Attributes:
        parts: names of `PARTS`; more may join in a later call.
        sparsities: of the decoder's matrices.
        healed: the sparsity that is healed.
        samples: that masks are calibrated on, of each stream.
        items: questions of text, and as many about pictures (films, sounds).
        task_seed: of the questions.
    """

    parts: tuple[str, ...] = PARTS
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7)
    healed: float = 0.7
    samples: int = 32
    items: int = 160
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise UsageError(f"there is no part {unknown[0]!r}", remedy=f"choose among {', '.join(PARTS)}")
        if self.reuse is not None and not self.tuned:
            raise UsageError(
                "a quickstart has no model of four kinds, so that nothing is taken from it",
                where="--reuse",
                remedy="leave it out, or name another part beside kinds",
            )
        if not all(0 < sparsity < 1 for sparsity in (*self.sparsities, self.healed)) or not self.sparsities:
            raise UsageError("a sparsity is a share between 0 and 1", remedy="such as --sparsities 0.3,0.5,0.7")
        check_count(self.samples, "samples")
        check_count(self.items, "items")

    @property
    def facts(self) -> dict[str, Any]:
        return {
            **super().facts,
            "study": "subnetwork",
            "healed": self.healed,
            "samples": self.samples,
            "items": self.items,
            "task_seed": self.task_seed,
        }

    @property
    def tuned(self) -> bool:
        """Whether the fully tuned models play a part."""
        return self.parts != ("kinds",)

    # -- models of four kinds -----------------------------------------------------------------------------------------

    def kinds_recipe(self, seed: int) -> Recipe:
        """What trains the model of four kinds."""
        path = RECIPES / f"{_FOUR}.yaml"
        changes = [f"output_dir={self.own.run_directory(seed, _FOUR)}", f"seed={seed}"]
        if self.steps != 1.0:
            stages = load_recipe(path, changes).stages
            changes += [
                f"stages.{stage.name}.steps={max(1, round((stage.steps or 0) * self.steps))}" for stage in stages
            ]
        return load_recipe(path, changes)

    def kinds_model(self, seed: int) -> Path:
        """The trained model of four kinds."""
        return self.own.run_directory(seed, _FOUR) / "final"

    def kinds_training(self, seed: int) -> list[Job]:
        """The job that trains it, unless it is there."""
        if self.kinds_model(seed).is_dir():
            return []
        recipe = self.kinds_recipe(seed)
        job = Job(
            title=f"four kinds, seed {seed}",
            call=train_kinds,
            arguments=(self, seed),
            size=sum(stage.steps or 0 for stage in recipe.stages),
            done=partial(logged_steps, recipe),
        )
        return [job]


def train_kinds(plan: SubnetworkPlan, seed: int) -> None:
    """Train the model of four kinds of a seed."""
    train(plan.kinds_recipe(seed), quiet=True)
