"""What models are asked, and what is highlighted meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alula.draws import Draw
from alula_fledgling.microworld import SceneImage
from alula_fledgling.microworld.items import user
from alula_fledgling.microworld.language import ask
from alula_fledgling.microworld.scenes import SEEN_PAIRS, SHAPES, Scene, Thing, draw_scene, split_of_scene

Messages = list[Any]


@dataclass(frozen=True)
class Question:
    """A question about one held-out picture.

    Attributes:
        highlighted: the thing that is pointed at; None: the whole picture.
        gold: the right answer; to an ambiguous question the one about what is highlighted.
        other: the answer about the other thing; "" where there is none.
    """

    scene: Scene
    words: str
    gold: str
    highlighted: Thing | None = None
    other: str = ""

    @property
    def messages(self) -> Messages:
        return [user(self.words, SceneImage(self.scene))]


def _drawn(name: str, count: int, seed: int, make: Callable[[Draw], Question | None]) -> list[Question]:
    found: list[Question] = []
    index = 0
    while len(found) < count:
        question = make(Draw(name, seed, index))
        index += 1
        if question is not None and split_of_scene(question.scene) == "test":
            found.append(question)
    return found


def ambiguous(count: int, seed: int) -> list[Question]:
    """Two things of one shape and two colours: what colour is it? One of them is highlighted."""

    def make(draw: Draw) -> Question:
        shape = draw.choice(SHAPES)
        colours = draw.sample([colour for colour, each in SEEN_PAIRS if each == shape], 2)
        cells = draw.sample(range(9), 2)
        things = [Thing(colour, shape, "large", cell) for colour, cell in zip(colours, cells, strict=True)]
        scene = Scene(tuple(sorted(things, key=lambda thing: thing.cell)), draw.below(4))
        one, other = things
        return Question(scene, f"What colour is the {shape}?", one.colour, one, other.colour)

    return _drawn("highlight: ambiguous", count, seed, make)


def clear(count: int, seed: int, *, misled: bool) -> list[Question]:
    """A colour or a shape is asked by place, which has one answer; what is highlighted is that thing or, `misled`,
    another one."""

    def make(draw: Draw) -> Question | None:
        scene = draw_scene(draw, draw.between(2, 4), pairs=SEEN_PAIRS)
        kind, (asked, other) = draw.choice(("colour", "shape")), draw.sample(list(scene.things), 2)
        exchange = ask(draw, kind, scene, focus=asked, pairs=SEEN_PAIRS)
        if exchange is None or getattr(other, kind) == exchange.answer:
            return None
        highlighted = other if misled else asked
        return Question(scene, exchange.question, exchange.answer, highlighted, getattr(other, kind))

    return _drawn("highlight: clear", count, seed, make)


def whole(kind: str, count: int, seed: int) -> list[Question]:
    """Whether something is there, or a description; the whole picture is highlighted."""

    def make(draw: Draw) -> Question | None:
        scene = draw_scene(draw, draw.between(2, 4), pairs=SEEN_PAIRS)
        exchange = ask(draw, kind, scene, pairs=SEEN_PAIRS)
        return None if exchange is None else Question(scene, exchange.question, exchange.answer)

    return _drawn(f"highlight: {kind}", count, seed, make)
