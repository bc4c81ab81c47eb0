"""What the quickstart compares, and where it keeps things. The trainings themselves are the recipes in `recipes/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from alula.bounds import check_training
from alula.evaluation import Task
from alula.training import load_recipe
from alula.training.recipe import Recipe
from alula_fledgling.tasks import DEFAULT, native_tasks

RECIPES = Path(str(files("alula_fledgling.quickstart") / "recipes"))
ALIGN = "align"
BASE = "base"


@dataclass(frozen=True)
class Method:
    """One way of tuning: the recipe `recipes/<name>.yaml`, and how reports call it."""

    name: str
    label: str
    description: str


METHODS = (
    Method("full", "full fine-tuning", "every weight of the decoder, at the learning rate all methods share"),
    Method(
        "full-10x", "full fine-tuning, 10x rate", "the same at ten times the rate, as Wings' published baseline ran"
    ),
    Method("lora", "LoRA", "low-rank updates of the decoder's linear layers (PEFT)"),
    Method("wings", "Wings", "frozen decoder, visual and textual learners beside attention, exact gate"),
    Method("experts", "experts", "frozen decoder, a whole matrix beside every linear, in the turns that show an image"),
)


@dataclass(frozen=True)
class Plan:
    """A quickstart run.

    Attributes:
        output: directory of everything it writes.
        seeds: of training; each repeats all methods.
        methods: names out of `METHODS`.
        items: questions per task (dialogues: turns, about).
        task_seed: of the questions; the same for all models.
        tasks: what is asked, names of native tasks.
        steps: factor on the recipes' numbers of steps (tests use a tiny one).
    """

    output: Path
    seeds: tuple[int, ...] = (0,)
    methods: tuple[str, ...] = tuple(method.name for method in METHODS)
    items: int = 400
    task_seed: int = 0
    tasks: tuple[str, ...] = DEFAULT
    steps: float = 1.0

    def __post_init__(self) -> None:
        check_training(self.seeds, self.steps)

    def questions(self) -> list[Task]:
        """What every model is asked."""
        return native_tasks(self.tasks, n=self.items, seed=self.task_seed)

    def seed_directory(self, seed: int) -> Path:
        return self.output / f"seed-{seed}"

    def run_directory(self, seed: int, name: str) -> Path:
        """Where the training `name` (a method or "align") of a seed writes."""
        return self.seed_directory(seed) / name

    def aligned(self, seed: int) -> Path:
        """The host all methods of a seed start from, and are compared with."""
        return self.run_directory(seed, ALIGN) / "final"

    def recipe(self, seed: int, name: str, more: Sequence[str] = ()) -> Recipe:
        """The packaged recipe `name`, told its seed, start and output directory; `more` are further overrides."""
        path = RECIPES / f"{name}.yaml"
        overrides = [f"seed={seed}", f"output_dir={self.run_directory(seed, name)}"]
        if name != ALIGN:
            overrides.append(f"host.path={self.aligned(seed)}")
        overrides += more
        plain = load_recipe(path, overrides)
        for index, stage in enumerate(plain.stages):
            if stage.steps is not None and self.steps != 1.0:
                overrides.append(f"stages.{index}.steps={max(1, round(stage.steps * self.steps))}")
        return load_recipe(path, overrides)
