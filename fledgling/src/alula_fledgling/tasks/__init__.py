"""Tasks over the microworld, offline and seeded. Each is an entry point of the group ``alula.tasks``."""

from alula_fledgling.tasks.native import DEFAULT, NATIVE, TEXT_ONLY, default_tasks, native_tasks
from alula_fledgling.tasks.objects import chair, pope
from alula_fledgling.tasks.skills import (
    depth,
    depth_pictured,
    dialogue,
    dialogue_turns,
    film,
    film_unseen,
    interleaved,
    motion,
    normals,
    normals_pictured,
    pictures,
    points,
    points_unseen,
    response,
    response_unseen,
    sound,
    sound_unseen,
    text_after_image,
    text_after_text,
    text_bare,
    visual,
    visual_later,
    visual_unseen,
)
from alula_fledgling.tasks.truths import truthfulness

__all__ = [
    "DEFAULT", "NATIVE", "TEXT_ONLY", "default_tasks", "native_tasks",
    "text_bare", "text_after_image", "text_after_text", "visual", "visual_unseen", "visual_later", "pictures", "film",
    "film_unseen", "sound", "sound_unseen", "points", "points_unseen", "depth", "depth_pictured", "normals",
    "normals_pictured", "motion", "response", "response_unseen", "dialogue", "dialogue_turns", "interleaved", "pope",
    "chair", "truthfulness",
]  # fmt: skip
