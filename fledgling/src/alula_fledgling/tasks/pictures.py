"""Pictures of the microworld with the objects in them, where an object is a shape in its colour (``red circle``)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from alula.bounds import check_count, check_seed
from alula.data.annotations import AnnotatedPicture, Annotations
from alula.draws import Draw
from alula.evaluation.mentions import ObjectWords
from alula_fledgling import microworld
from alula_fledgling.microworld.language import caption, plural_of
from alula_fledgling.microworld.render import SceneImage
from alula_fledgling.microworld.scenes import PAIRS, SEEN_PAIRS, UNSEEN_PAIRS, Scene, draw_scene, split_of_scene

_TRAINING_PICTURES = 8000


def microworld_pictures(n: int, *, split: str = "test", seed: int = 0, least: int = 1, most: int = 4) -> Annotations:
    """Return ``n`` pictures of ``least`` to ``most`` things that all look different.

    Args:
        split: ``"test"``: known combinations of colour and shape in new scenes; ``"unseen"``: each picture shows one
            combination that is kept out of training. The categories are those a question may name.
    """
    check_count(n, "pictures: n")
    check_seed(seed, "pictures: seed")
    new = sorted(UNSEEN_PAIRS)
    pictures: list[AnnotatedPicture] = []
    index = 0
    while len(pictures) < n:
        draw = Draw("objects", split, seed, index)
        first = draw.choice(new) if split == "unseen" else None
        scene = draw_scene(draw, draw.between(least, most), pairs=SEEN_PAIRS, first=first)
        if first is not None or split_of_scene(scene) == split:
            pictures.append(_annotated(f"objects-{split}-{seed}-{index}", scene))
        index += 1
    pairs = PAIRS if split == "unseen" else SEEN_PAIRS
    return Annotations(tuple(pictures), tuple(" ".join(pair) for pair in pairs))


@lru_cache(maxsize=1)
def training_pictures() -> Annotations:
    """Return pictures as the visual stream shows them in training: what is frequent and what goes together there."""
    stream = microworld.source("visual", split="train", seed=0)
    scenes = ((f"train-{index}", _scene(stream[index])) for index in range(_TRAINING_PICTURES))
    pictures = tuple(_annotated(name, scene) for name, scene in scenes if isinstance(scene, Scene))
    return Annotations(pictures, tuple(" ".join(pair) for pair in PAIRS))


def microworld_words() -> ObjectWords:
    """Return what a description calls the microworld's objects."""
    return ObjectWords({f"{colour} {shape}": [f"{colour} {plural_of(shape)}"] for colour, shape in PAIRS})


def _annotated(name: str, scene: Scene) -> AnnotatedPicture:
    return AnnotatedPicture(name, SceneImage(scene), frozenset(thing.name for thing in scene.things), (caption(scene),))


def _scene(item: Any) -> Any:
    return item.messages[0]["content"][0]["image"].scene
