"""POPE and CHAIR over pictures of the microworld: objects that a model makes up."""

from __future__ import annotations

from collections.abc import Sequence

from alula.evaluation.chair import chair_task
from alula.evaluation.items import Task
from alula.evaluation.pope import CONFUSABLE, PER_PICTURE, SETTINGS, Reading, pictures_for, pope_items, pope_task
from alula_fledgling.tasks.pictures import microworld_pictures, microworld_words, training_pictures


def pope(
    n: int = 400,
    seed: int = 0,
    *,
    negatives: Sequence[str] = (*SETTINGS, CONFUSABLE),
    split: str = "test",
    reading: Reading = "strict",
) -> Task:
    """POPE over the microworld: about ``n`` questions on whole pictures of three or four things, the settings in turn.

    What is popular and what goes together is counted in the training pictures. They are drawn evenly, so these two
    settings differ little from ``random`` by construction; ``confusable`` is the hard one here.

    Args:
        split: see `microworld_pictures`.
    """
    shown = microworld_pictures(pictures_for(n, negatives), split=split, seed=seed, least=PER_PICTURE // 2)
    items = pope_items(
        shown.pictures, shown.categories, training_pictures().pictures, negatives, seed=seed, template="Is there {}?"
    )
    return pope_task("pope", "objects in pictures (POPE)", items, reading, n=n, seed=seed, split=split)


def chair(n: int = 400, seed: int = 0, *, split: str = "test", max_new_tokens: int = 64) -> Task:
    """CHAIR over ``n`` pictures of the microworld with one to three things, as its captions have."""
    shown = microworld_pictures(n, split=split, seed=seed, most=3)
    settings = {"n": n, "seed": seed, "split": split}
    return chair_task(shown.pictures, microworld_words(), "Describe the picture.", max_new_tokens, settings)
