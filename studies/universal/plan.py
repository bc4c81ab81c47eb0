"""What the study of the universal encoder trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alula.bounds import check_count
from alula.training import load_recipe
from alula.training.recipe import Recipe
from studies.plan import StudyPlan

IMAGE = "image"
"""the training that all arms of a seed start from: images alone, one expert"""
JOINT = "joint"
"""the arm that others are held to: all media together, three experts copied from the images' one, soft router"""
CAPTIONS = {"image": "caption", "video": "film_caption", "audio": "sound_caption"}
"""medium -> the microworld's captions of it"""
SENSES = {
    "image": "caption",
    "points": "points_caption",
    "depth": "depth_caption",
    "normals": "normals_caption",
    "motion": "motion_caption",
    "response": "response_caption",
}
"""the same of the five media that come in the paper's second and third stage, beside pictures"""
_SECOND = ("image", "points")
"""media of the second stage of these; the third has all, so that earlier ones are replayed"""
SENSES_ARMS = (JOINT, "separate", "random")
_RECIPE = Path(__file__).parents[2] / "recipes" / "universal.yaml"
_BATCH = 8


@dataclass(frozen=True)
class Arm:
    """One way to go on from images.

    Attributes:
        label: what reports call it.
        settings: of method `universal`, beside the media.
        tower: the encoder is trained, too.
        separate: one model per medium, each on its own captions for its share of the steps.
    """

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tower: bool = False
    separate: bool = False

    def models(self, name: str, media: Iterable[str] = CAPTIONS) -> dict[str, tuple[str, ...]]:
        """Names of its trainings -> the media each is trained on."""
        if self.separate:
            return {f"{name}-{medium}": (medium,) for medium in media}
        return {name: tuple(media)}


_THREE = {"experts": 3}
ARMS: Mapping[str, Arm] = {
    JOINT: Arm("joint, three experts copied, soft router (sigmoid)", _THREE),
    "separate": Arm("one model per medium", _THREE, separate=True),
    "random": Arm("experts from random weights", {**_THREE, "start": "random"}),
    "one": Arm("one expert"),
    "five": Arm("five experts", {"experts": 5}),
    "softmax": Arm("softmax router", {**_THREE, "router": "softmax"}),
    "constant": Arm("constant router", {**_THREE, "router": "constant"}),
    "sparse": Arm("sparse router", {**_THREE, "router": "sparse"}),
    "tuned": Arm("encoder tuned, too", _THREE, tower=True),
}


@dataclass(frozen=True)
class UniversalPlan(StudyPlan):
    """Hosts aligned with images, then with films and sounds beside them, in every way of `ARMS`.

    Attributes:
        images: optimizer steps of the first stage, before the factor `steps`.
        training: of every arm; a third of them where each medium has a model of its own.
        items: held-out captions of each medium.
        task_seed: of these.
        senses: points, then depth, normals, motion and responses beside pictures, in two stages, in place of films and
            sounds; a third of `training` is the first of them.
    """

    images: int = 150
    training: int = 120
    items: int = 64
    task_seed: int = 0
    senses: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("images", "training", "items"):
            check_count(getattr(self, name), name)

    @property
    def facts(self) -> dict[str, Any]:
        return {
            **super().facts,
            "study": "universal",
            "images": self.images,
            "training": self.training,
            "items": self.items,
            "task_seed": self.task_seed,
            **({"senses": True} if self.senses else {}),
        }

    @property
    def captions(self) -> Mapping[str, str]:
        """Medium -> the microworld's captions of it, of all that is trained and measured."""
        return SENSES if self.senses else CAPTIONS

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of `ARMS` that are trained."""
        return SENSES_ARMS if self.senses else tuple(ARMS)

    def model(self, seed: int, name: str) -> Path:
        """Where a training leaves its model."""
        return self.own.run_directory(seed, name) / "final"

    def measured(self, seed: int, arm: str) -> Path:
        """Where what was measured of an arm is kept."""
        return self.own.seed_directory(seed) / "measured" / f"{arm}.json"

    def first(self, seed: int) -> Recipe:
        """The recipe of the first stage."""
        told = self._told(seed, IMAGE, self.images)
        return Recipe.model_validate({**told, "stages": told["stages"][:1]})

    def recipe_of(self, seed: int, arm: str, name: str) -> Recipe:
        """The recipe of one of an arm's trainings."""
        chosen = ARMS[arm]
        media = chosen.models(arm, self.captions)[name]
        told = self._told(seed, name, self.training)
        stage = told["stages"][1]
        if chosen.separate:
            shares = {media: self._share(media[0])}
        elif self.senses:
            shares = {_SECOND: self.training // 3, media: self.training - self.training // 3}
        else:
            shares = {media: self.training}
        stages = []
        for number, (own, steps) in enumerate(shares.items()):
            settings = chosen.settings if number == 0 else {}  # experts are there then
            parts = [
                "connector.shared",
                *(f"connector.{medium}" for medium in own),
                *(["tower"] if chosen.tower else []),
            ]
            changes = {
                "name": stage["name"] if len(shares) == 1 else f"{number + 2}-{'-'.join(own)}",
                "universal": {"media": list(own), **settings},
                "train": dict.fromkeys(parts, 2e-3),
                "data": {"sources": [{"microworld": self.captions[medium]} for medium in own]},
                "steps": max(1, round(steps * self.steps)),
            }
            stages.append({**stage, **changes})
        return Recipe.model_validate({**told, "host": {"path": str(self.model(seed, IMAGE))}, "stages": stages})

    def _share(self, medium: str) -> int:
        """Steps of one medium among the steps of all."""
        if not self.senses:
            return self.training // len(self.captions)
        second = self.training // 3
        return (second // len(_SECOND) if medium in _SECOND else 0) + (self.training - second) // len(self.captions)

    def _told(self, seed: int, name: str, steps: int) -> dict[str, Any]:
        changes = {"seed": seed, "output_dir": self.own.run_directory(seed, name)}
        recipe = load_recipe(_RECIPE, [f"{key}={value}" for key, value in changes.items()])
        told: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True)
        sizes = {name: size for name, size in told["host"]["modality_options"].items() if name in self.captions}
        told["host"] |= {"modalities": [*self.captions], "modality_options": sizes}
        if "audio" not in self.captions:
            told["host"].pop("feature_extractor")
        for stage in told["stages"]:
            stage |= {"steps": max(1, round(steps * self.steps)), "batch_size": _BATCH}
        return told
