"""Questions that one picture cannot answer: what changed, which one shows it, how many in all, what to read after all
were shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange, Split
from alula_fledgling.microworld.language import article, ask, caption, plural_of
from alula_fledgling.microworld.scenes import SEEN_PAIRS, SHAPES, Scene, Thing, draw_scene, split_of_scene

PICTURE_FAMILIES = ("change", "which", "total", "later")
"""what changed between two pictures; which of four shows something; how many in all pictures; what one of them shows,
where the words behind the pictures say which"""
_ABOUT_ONE = ("colour", "shape", "position", "count")
NOTHING = "nothing"
"""the caption of a picture in which nothing is asked for"""


class Asked(NamedTuple):
    """Pictures with a question about them.

    Attributes:
        scenes: in order.
        relevant: of each picture the things that the answer depends on.
    """

    scenes: tuple[Scene, ...]
    exchange: Exchange
    relevant: tuple[tuple[Thing, ...], ...]

    def told(self, index: int) -> str:
        """A caption of one picture that tells what matters to the question, and nothing else."""
        things = self.relevant[index]
        return caption(Scene(things)) if things else NOTHING


def pictures_and_question(draw: Draw, family: str, split: Split) -> Asked:
    """Pictures, each of the split, and a question of a family of `PICTURE_FAMILIES`."""
    while True:
        asked = _MAKE[family](draw)
        if asked is not None and all(split_of_scene(scene) == split for scene in asked.scenes):
            return asked


def _change(draw: Draw) -> Asked | None:
    before = draw_scene(draw, draw.between(2, 3), pairs=SEEN_PAIRS)
    thing, kind = draw.choice(before.things), draw.choice(("new", "gone", "moved", "colour"))
    free = [cell for cell in range(9) if cell not in {each.cell for each in before.things}]
    if kind == "moved":
        changed = replace(thing, cell=draw.choice(free))
        after = [changed if each is thing else each for each in before.things]
        exchange = Exchange("Which thing moved?", thing.name)
    elif kind == "colour":
        taken = {each.pair for each in before.things}
        colours = [colour for colour, shape in SEEN_PAIRS if shape == thing.shape and (colour, shape) not in taken]
        changed = replace(thing, colour=draw.choice(colours))
        after = [changed if each is thing else each for each in before.things]
        exchange = Exchange("What was the colour of the thing with another colour in picture 2?", thing.colour)
    else:
        left = [each for each in before.things if each is not thing]
        words = "Which thing is in picture {} and not in picture {}?"
        scenes = (_scene(before.things, before.background), _scene(left, draw.below(4)))
        relevant: tuple[tuple[Thing, ...], ...] = ((thing,), ())
        if kind == "new":
            scenes, relevant = scenes[::-1], relevant[::-1]
        return Asked(scenes, Exchange(words.format(*((2, 1) if kind == "new" else (1, 2))), thing.name), relevant)
    return Asked((before, _scene(after, draw.below(4))), exchange, ((thing,), (changed,)))


def _which(draw: Draw) -> Asked | None:
    pair, place = draw.choice(SEEN_PAIRS), draw.below(4)
    others = [each for each in SEEN_PAIRS if each != pair]
    scenes = [
        draw_scene(draw, draw.between(1, 2), pairs=SEEN_PAIRS, first=pair)
        if index == place
        else draw_scene(draw, draw.between(1, 2), pairs=others)
        for index in range(4)
    ]
    relevant = tuple(tuple(thing for thing in scene.things if thing.pair == pair) for scene in scenes)
    words = draw.choice(("Which picture shows {}?", "In which picture is {}?")).format(article(" ".join(pair)))
    return Asked(tuple(scenes), Exchange(words, str(place + 1)), relevant)


def _total(draw: Draw) -> Asked | None:
    scenes = tuple(
        draw_scene(draw, draw.between(1, 3), pairs=SEEN_PAIRS, alike=True) for _ in range(draw.between(2, 3))
    )
    shape = draw.choice([thing.shape for scene in scenes for thing in scene.things])
    if draw.chance(0.1):
        shape = draw.choice(SHAPES)
    relevant = tuple(tuple(thing for thing in scene.things if thing.shape == shape) for scene in scenes)
    words = draw.choice(("How many {} are there in all pictures?", "Count the {} in all pictures."))
    return Asked(scenes, Exchange(words.format(plural_of(shape)), str(sum(map(len, relevant)))), relevant)


def _later(draw: Draw) -> Asked | None:
    scenes = tuple(draw_scene(draw, draw.between(1, 3), pairs=SEEN_PAIRS) for _ in range(draw.between(2, 4)))
    place, kind = draw.below(len(scenes)), draw.choice(_ABOUT_ONE)
    focus = draw.choice(scenes[place].things)
    exchange = ask(draw, kind, scenes[place], focus=focus, pairs=SEEN_PAIRS)
    if exchange is None:
        return None
    seen = scenes[place].things if kind == "count" else (focus,)
    relevant = tuple(seen if index == place else () for index in range(len(scenes)))
    return Asked(scenes, Exchange(f"Picture {place + 1}: {exchange.question}", exchange.answer), relevant)


def _scene(things: tuple[Thing, ...] | list[Thing], background: int) -> Scene:
    return Scene(tuple(sorted(things, key=lambda thing: thing.cell)), background)


_MAKE: dict[str, Callable[[Draw], Asked | None]] = {
    "change": _change,
    "which": _which,
    "total": _total,
    "later": _later,
}
