"""Reading a described scene: the questions of the visual families, asked of a description in words.

Held out by the scene. The combinations that are unseen in visual training do occur here: the language is known before
the picture.
"""

from __future__ import annotations

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.language import QUESTION_KINDS, ask, describe
from alula_fledgling.microworld.scenes import AnyScene, draw_number, draw_scene, split_of_scene
from alula_fledgling.microworld.skills.story import Story


def reading(draw: Draw, split: str) -> tuple[Exchange, ...]:
    return reading_story(draw, split).asked(draw)


def reading_story(draw: Draw, split: str, questions: int = 1) -> Story:
    """A scene in words, with a question of a kind drawn evenly; up to ``questions`` of them, the others of any kind."""
    while True:
        kind = draw.choice(QUESTION_KINDS)
        scene: AnyScene = (
            draw_number(draw)
            if kind == "digits"
            else draw_scene(draw, draw.between(1, 4 if kind == "count" else 3), alike=kind == "count")
        )
        # in words a single digit has nothing but itself to be told apart by, so it is no held-out content
        if scene.content in _SINGLE_DIGITS or split_of_scene(scene) != split:
            continue
        first = ask(draw, kind, scene)
        if first is not None:
            break
    others = (ask(draw, draw.choice(QUESTION_KINDS), scene) for _ in range(questions - 1))
    return Story(describe(draw, scene), (first, *(other for other in others if other is not None)))


_SINGLE_DIGITS = frozenset(f"number {digit}" for digit in range(10))
