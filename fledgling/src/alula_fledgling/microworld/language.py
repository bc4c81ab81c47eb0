"""How scenes are talked about; pictures and scenes described in words are asked the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.scenes import COLOURS, PAIRS, SHAPES, AnyScene, NumberScene, Scene, Thing

QUESTION_KINDS = ("colour", "shape", "count", "position", "relation", "existence", "caption", "digits")


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def listing(parts: Sequence[str]) -> str:
    """``"a"``, ``"a and b"``, ``"a, b and c"``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def caption(scene: AnyScene) -> str:
    """The one canonical description of a scene: what there is and where, in reading order."""
    if isinstance(scene, NumberScene):
        return f"the number {scene.digits}"
    return listing([f"a {thing.full_name} at the {thing.position}" for thing in scene.things])


def describe(draw: Draw, scene: AnyScene) -> str:
    """Say in one of several ways, and in any order, what a scene shows."""
    if isinstance(scene, NumberScene):
        return draw.choice(
            (
                "The picture shows the number {}.",
                "There is a number in the picture. It is {}.",
                "Scene: the number {}.",
                "Someone wrote the number {}.",
            )
        ).format(scene.digits)
    things = list(scene.things)
    draw.shuffle(things)
    style = draw.below(5)
    if style == 0:
        return " ".join(f"There is a {thing.full_name} at the {thing.position}." for thing in things)
    if style == 1:
        return f"The picture shows {listing([f'a {thing.full_name} at the {thing.position}' for thing in things])}."
    if style == 2:
        return f"Scene: {'; '.join(f'{thing.position}, {thing.full_name}' for thing in things)}."
    if style == 3:
        return " ".join(f"A {thing.full_name} is at the {thing.position}." for thing in things)
    return f"I see {listing([f'a {thing.full_name} at the {thing.position}' for thing in things])}."


def ask(
    draw: Draw, kind: str, scene: AnyScene, *, focus: Thing | None = None, pairs: Sequence[tuple[str, str]] = PAIRS
) -> Exchange | None:
    """A question of one kind about a scene, with its answer, or None where the scene has none to offer.

    Args:
        kind: a member of ``QUESTION_KINDS``.
        focus: a thing the question must turn on.
        pairs: combinations the question may name that are not in the scene.
    """
    if kind == "digits":
        return _digits(draw, scene) if isinstance(scene, NumberScene) else None
    if kind == "caption":
        return Exchange(draw.choice(_DESCRIBE), caption(scene))
    if isinstance(scene, NumberScene):
        return None
    return _ASK[kind](draw, scene, focus, pairs)


_DESCRIBE = (
    "Describe the picture.",
    "What is in the picture?",
    "What does the picture show?",
    "Say what you see.",
    "Give a caption.",
)


def _digits(draw: Draw, scene: NumberScene) -> Exchange:
    question = draw.choice(
        ("What number is shown?", "Read the number.", "Which number is written here?", "What number do you see?")
    )
    return Exchange(question, scene.digits)


def _alone(scene: Scene, *, colour: str | None = None, shape: str | None = None) -> bool:
    """Whether exactly one thing has this colour and this shape."""
    return sum(colour in (None, thing.colour) and shape in (None, thing.shape) for thing in scene.things) == 1


def _colour(draw: Draw, scene: Scene, focus: Thing | None, pairs: Sequence[tuple[str, str]]) -> Exchange | None:
    thing = focus or draw.choice(scene.things)
    if _alone(scene, shape=thing.shape) and draw.chance(0.6):
        question = draw.choice(
            (
                "What colour is the {}?",
                "What is the colour of the {}?",
                "Which colour does the {} have?",
                "The {} has what colour?",
            )
        ).format(thing.shape)
    else:
        question = draw.choice(
            (
                "What colour is the shape at the {}?",
                "Which colour is at the {}?",
                "What is the colour of the thing at the {}?",
            )
        ).format(thing.position)
    return Exchange(question, thing.colour)


def _shape(draw: Draw, scene: Scene, focus: Thing | None, pairs: Sequence[tuple[str, str]]) -> Exchange | None:
    thing = focus or draw.choice(scene.things)
    if _alone(scene, colour=thing.colour) and draw.chance(0.6):
        question = draw.choice(
            ("What shape is {}?", "Which shape is the {} one?", "What is the {} thing?", "Which shape is {}?")
        ).format(thing.colour)
    else:
        question = draw.choice(
            ("What shape is at the {}?", "Which shape is at the {}?", "What is at the {}, which shape?")
        ).format(thing.position)
    return Exchange(question, thing.shape)


def _count(draw: Draw, scene: Scene, focus: Thing | None, pairs: Sequence[tuple[str, str]]) -> Exchange | None:
    by = draw.below(3)
    if by == 0:
        question = draw.choice(("How many shapes are there?", "How many things do you see?", "Count the shapes."))
        return Exchange(question, str(len(scene.things)))
    # now and then nothing of the kind is there
    there = focus or (draw.choice(scene.things) if draw.chance(0.85) else None)
    if by == 1:
        colour = there.colour if there else draw.choice(COLOURS)
        question = draw.choice(
            ("How many {} shapes are there?", "How many things are {}?", "Count the {} ones.")
        ).format(colour)
        return Exchange(question, str(sum(thing.colour == colour for thing in scene.things)))
    shape = there.shape if there else draw.choice(SHAPES)
    plural = plural_of(shape)
    question = draw.choice(("How many {} are there?", "How many {} do you see?", "Count the {}.")).format(plural)
    return Exchange(question, str(sum(thing.shape == shape for thing in scene.things)))


def plural_of(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _position(draw: Draw, scene: Scene, focus: Thing | None, pairs: Sequence[tuple[str, str]]) -> Exchange | None:
    thing = focus or draw.choice(scene.things)
    if not _alone(scene, colour=thing.colour, shape=thing.shape):
        return None
    name = thing.name
    if focus is None and _alone(scene, shape=thing.shape) and draw.chance(0.4):
        name = thing.shape
    question = draw.choice(
        ("Where is the {}?", "Where do you see the {}?", "At which place is the {}?", "Where in the picture is the {}?")
    ).format(name)
    return Exchange(question, thing.position)


_RELATIONS: tuple[tuple[str, Callable[[Thing, Thing], int]], ...] = (
    ("further left", lambda a, b: b.column - a.column),
    ("further right", lambda a, b: a.column - b.column),
    ("higher", lambda a, b: b.row - a.row),
    ("lower", lambda a, b: a.row - b.row),
)


def _relation(draw: Draw, scene: Scene, focus: Thing | None, pairs: Sequence[tuple[str, str]]) -> Exchange | None:
    if len(scene.things) < 2:
        return None
    one, other = draw.sample(scene.things, 2)
    if focus is not None and focus not in (one, other):
        one = focus
    words, difference = draw.choice(_RELATIONS)
    if difference(one, other) == 0:
        return None
    if not (
        _alone(scene, colour=one.colour, shape=one.shape) and _alone(scene, colour=other.colour, shape=other.shape)
    ):
        return None
    question = draw.choice(("Which is {}, the {} or the {}?", "What is {}: the {} or the {}?")).format(
        words, one.name, other.name
    )
    return Exchange(question, one.name if difference(one, other) > 0 else other.name)


def _existence(draw: Draw, scene: Scene, focus: Thing | None, pairs: Sequence[tuple[str, str]]) -> Exchange | None:
    present = {thing.pair for thing in scene.things}
    if draw.chance(0.5):
        thing = focus or draw.choice(scene.things)
        colour, shape, answer = thing.colour, thing.shape, "yes"
    else:
        absent = [pair for pair in pairs if pair not in present]
        if draw.chance(0.6):  # half right is the harder question
            colours, shapes = {pair[0] for pair in present}, {pair[1] for pair in present}
            absent = [pair for pair in absent if pair[0] in colours or pair[1] in shapes] or absent
        if not absent:
            return None
        (colour, shape), answer = draw.choice(absent), "no"
    question = draw.choice(
        ("Is there {}?", "Do you see {}?", "Does the picture show {}?", "Can you find {} in the picture?")
    ).format(article(f"{colour} {shape}"))
    return Exchange(question, answer)


_ASK: dict[str, Callable[[Draw, Scene, Thing | None, Sequence[tuple[str, str]]], Exchange | None]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "relation": _relation,
    "existence": _existence,
}
