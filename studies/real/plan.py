"""What the study on real weights trains and measures, and where it keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alula.bounds import check_training
from alula.errors import UsageError
from alula.training.reading import parse_recipe
from alula.training.recipe import Recipe
from studies.real.arms import ALIGN_RATE, ARMS, Arm

BASE = "base"
"""the aligned host, before any tuning"""
CAPTIONS = ("stamps", "emoji")
PROBED = (BASE, "full", "wings")
"""models whose insides are looked at"""


@dataclass(frozen=True)
class RealPlan:
    """The study's settings.

    Attributes:
        output: directory of everything it writes.
        real: what `alula real prepare` made.
        benchmarks: directory of ``blimp.zip`` (or ``blimp/*.jsonl``), ``coda_colours.jsonl``, ``coda_objects.jsonl``
            and ``gsm8k_test.jsonl``.
        llm, tower: of the host; by default those of ``real``.
        seeds: of training; each repeats the whole.
        arms: names of the ways; with none, all.
        training: optimizer steps of every way.
        align: optimizer steps of the connector before.
        batch: samples per step.
        items: of every paradigm of BLiMP; all other counts are multiples of it.
        precision: that models are trained and asked in; bf16 is autocast over float32 weights.
    """

    output: Path
    real: Path
    benchmarks: Path
    llm: Path | None = None
    tower: Path | None = None
    seeds: tuple[int, ...] = (0,)
    arms: tuple[str, ...] = ()
    training: int = 48
    align: int = 60
    batch: int = 8
    items: int = 10
    precision: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        check_training(self.seeds, 1.0)
        known = [arm.name for arm in ARMS]
        if unknown := [name for name in self.arms if name not in known]:
            raise UsageError(f"there is no arm {', '.join(unknown)!r}", remedy=f"choose among {', '.join(known)}")
        for directory, remedy in (
            (self.real / "data", "make it: alula real prepare DIR, and name it with --real"),
            (self.benchmarks, "name the directory of your copies of BLiMP, CoDa and GSM8K with --benchmarks"),
        ):
            if not directory.is_dir():
                raise UsageError("is no directory", where=str(directory), remedy=remedy)

    @property
    def facts(self) -> dict[str, Any]:
        """The settings that decide what is computed for a seed, as JSON values."""
        return {
            "study": "real",
            "llm": self.language_model.name,
            "tower": self.vision_tower.name,
            "training": self.training,
            "align": self.align,
            "batch": self.batch,
            "items": self.items,
            "precision": self.precision,
        }

    @property
    def chosen(self) -> list[Arm]:
        """The arms, in their order."""
        return [arm for arm in ARMS if not self.arms or arm.name in self.arms]

    @property
    def language_model(self) -> Path:
        return self.llm or self.real / "models" / "smollm2-135m-instruct"

    @property
    def vision_tower(self) -> Path:
        return self.tower or self.real / "models" / "efficientnet-lite0"

    @property
    def milestones(self) -> tuple[int, ...]:
        """Steps after which a model in training is measured briefly; at its end it is measured in full."""
        return (max(1, self.training // 2),)

    def data(self, name: str, split: str) -> Path:
        """A file of prepared records."""
        return self.real / "data" / name / f"{split}.jsonl"

    @property
    def questions(self) -> Path:
        """Yes-no questions about training pictures, which the study writes."""
        return self.output / "questions.jsonl"

    def seed_directory(self, seed: int) -> Path:
        return self.output / f"seed-{seed}"

    def replay(self, seed: int) -> Path:
        """What the aligned host says to questions it wrote itself."""
        return self.seed_directory(seed) / "replay.jsonl"

    def run_directory(self, seed: int, name: str) -> Path:
        return self.seed_directory(seed) / name

    def aligned(self, seed: int) -> Path:
        return self.run_directory(seed, "align") / "final"

    def model(self, seed: int, name: str) -> Path:
        """The trained model of an arm, or the base."""
        return self.aligned(seed) if name == BASE else self.run_directory(seed, name) / "final"

    def measured(self, seed: int, name: str) -> Path:
        """What was measured of a model."""
        return self.seed_directory(seed) / "measured" / f"{name}.json"

    def sight(self, seed: int, name: str) -> Path:
        """What a model says behind other pictures."""
        return self.seed_directory(seed) / "sight" / f"{name}.json"

    def inside(self, seed: int, name: str) -> Path:
        """What probes saw of a model."""
        return self.seed_directory(seed) / "inside" / f"{name}.json"

    def on_the_way(self, seed: int, name: str) -> Path:
        """Directory of what was measured of a model in training."""
        return self.seed_directory(seed) / "on-the-way" / name

    def align_recipe(self, seed: int) -> Recipe:
        stage = {
            "name": "align",
            "method": "projector",
            "train": {"projector": ALIGN_RATE},
            "data": self._captions,
            "steps": self.align,
        }
        host = {"llm": str(self.language_model), "vision": str(self.vision_tower)}
        return self._recipe(seed, "align", host, [stage])

    def recipe_of(self, seed: int, arm: Arm) -> Recipe:
        sources = [
            *({"jsonl": str(self.data(name, "train"))} for name in (*CAPTIONS, "easy-vqa")),
            {"jsonl": str(self.questions)},
        ]
        replay = {"ratio": 0.25, "sources": [{"jsonl": str(self.replay(seed))}]}
        stages = arm.stages(self.training, {"sources": sources}, self._captions, replay)
        return self._recipe(seed, arm.name, {"path": str(self.aligned(seed))}, stages)

    @property
    def _captions(self) -> dict[str, Any]:
        return {"sources": [{"jsonl": str(self.data(name, "train"))} for name in CAPTIONS]}

    def _recipe(self, seed: int, name: str, host: Mapping[str, Any], stages: list[dict[str, Any]]) -> Recipe:
        shared = {"batch_size": self.batch, "feature_cache": {"disk": str(self.output / "features")}}
        return parse_recipe(
            {
                "name": name,
                "seed": seed,
                "output_dir": str(self.run_directory(seed, name)),
                "precision": self.precision,
                "host": dict(host),
                "stages": [{**shared, **stage} for stage in stages],
            }
        )
