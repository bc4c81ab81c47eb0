"""The microworld's tasks by name, and which of them a model is asked when nothing is said."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from alula.data.interleave import History
from alula.errors import UsageError
from alula.evaluation.items import Task
from alula_fledgling.tasks import skills

NATIVE: dict[str, Callable[..., Task]] = {
    "text_bare": skills.text_bare,
    "text_after_image": skills.text_after_image,
    "text_after_text": skills.text_after_text,
    "visual": skills.visual,
    "visual_unseen": skills.visual_unseen,
    "visual_later": skills.visual_later,
    "pictures": skills.pictures,
    "film": skills.film,
    "film_unseen": skills.film_unseen,
    "sound": skills.sound,
    "sound_unseen": skills.sound_unseen,
    "points": skills.points,
    "points_unseen": skills.points_unseen,
    "depth": skills.depth,
    "depth_pictured": skills.depth_pictured,
    "normals": skills.normals,
    "normals_pictured": skills.normals_pictured,
    "motion": skills.motion,
    "response": skills.response,
    "response_unseen": skills.response_unseen,
    "dialogue": skills.dialogue_turns,
    "interleaved": skills.interleaved,
}
WITH_HISTORY = ("dialogue", "interleaved")
"""tasks whose earlier answers may be the model's own"""
DEFAULT = ("text_bare", "text_after_image", "visual", "visual_unseen", "dialogue")
"""what an image host is asked when nothing is said; a text LLM gets the text tasks of `NATIVE`"""
TEXT_ONLY = ("text_bare", "text_after_text")
BY_MEDIUM = {
    "video": ("film", "film_unseen"),
    "audio": ("sound", "sound_unseen"),
    "points": ("points", "points_unseen"),
    "depth": ("depth",),
    "normals": ("normals",),
    "motion": ("motion",),
    "response": ("response", "response_unseen"),
}
"""what a host is asked beside these, by a further medium that it takes"""


def default_tasks(takes: Collection[str]) -> tuple[str, ...]:
    """Names of the tasks a model is asked when nothing is said, by the media it takes (`alula.media`)."""
    names = DEFAULT if "image" in takes else TEXT_ONLY
    return (*names, *(name for medium, further in BY_MEDIUM.items() if medium in takes for name in further))


def native_tasks(
    names: Sequence[str] = DEFAULT, *, n: int = 400, seed: int = 0, history: History = "gold"
) -> list[Task]:
    """Return the named microworld tasks with about ``n`` items each.

    ``history`` goes to the tasks of `WITH_HISTORY`.

    Raises:
        UsageError: an unknown name, ``n`` below 1 or above `alula.bounds.MAX_ITEMS`, or a seed out of bounds.
    """
    if n < 1:
        raise UsageError(f"the number of items must be at least 1, not {n}")
    unknown = [name for name in names if name not in NATIVE]
    if unknown:
        raise UsageError(f"there is no task {unknown[0]!r}", where="tasks", remedy=f"choose among {', '.join(NATIVE)}")
    return [NATIVE[name](n=n, seed=seed, **({"history": history} if name in WITH_HISTORY else {})) for name in names]
