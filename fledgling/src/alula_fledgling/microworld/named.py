"""Named things: what they look like, only pictures tell.

A world has twelve things with names. Each has a colour, a shape, a size and usual company (a shape that always stands
to its right, in any colour). Captions of pictures say who is there and nothing more, so that words alone tell nothing
of how a thing looks. Of half of the things, the tutored ones, questions in words are taught with their answers; the
others, the held ones, are seen in pictures and never asked about before they are asked about in earnest.

Beside what pictures tell there is what only words tell, and what nothing tells: each colour has a metal (a rule, which
is taught in words; what a thing's metal is follows from its colour), and each thing a food (taught of tutored things,
and of held ones not to be known).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange, Split
from alula_fledgling.microworld.scenes import (
    COLOURS,
    NUM_BACKGROUNDS,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
)
from alula_fledgling.microworld.skills.facts import PROPERTIES
from alula_fledgling.microworld.splits import split_of

NAMES = PROPERTIES["capital"]
"""Words that the fledgling can say, one token each: cities, of whose looks, metal and food it was told nothing."""
METALS = ("iron", "silver", "copper", "gold", "zinc", "tin")
FOODS = ("bread", "plums", "grapes", "carrots", "cherries", "pickles")

NAMED_FAMILIES = ("colour", "shape", "company", "comparison", "two_hop", "untold", "rule")
SIGHT_FAMILIES = ("colour", "shape", "company", "comparison", "two_hop")
"""What can be answered of a held thing by who has seen it."""

# as the facts the fledgling remembers are asked for; "What colour is ...?" is what it is asked about rules it reads
_PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "colour": ("What is the colour of {}?", "Name the colour of {}."),
    "shape": ("What is the shape of {}?", "Name the shape of {}."),
    "company": ("What is the shape at the right of {}?", "Name the shape at the right of {}."),
    "two_hop": ("What is the metal of {}?", "Name the metal of {}."),
    "untold": ("What is the food of {}?", "Name the food of {}."),
    "rule": ("What is the metal of {} things?", "Name the metal of {} things."),
}
_COMPARED = (("larger", "large"), ("smaller", "small"))
_MIDDLE = 4
_WHO = ("Who is in the picture?", "Say who you see.", "Who is here?")
# of facts told in words; no question asks like this
_TOLD = {"colour": "colour", "shape": "shape", "size": "size", "company": "shape at the right"}
_TELL = ("Tell me the {} of {}.", "The {} of {} is which one?", "Say the {} of {}.")


@dataclass(frozen=True)
class NamedThing:
    """What is true of a name.

    Attributes:
        company: the shape that stands beside it.
        food: told by no picture.
        is_held: no question about it is taught.
    """

    name: str
    colour: str
    shape: str
    size: str
    company: str
    food: str
    is_held: bool


class NamedQuestion(NamedTuple):
    """A question in words with closed choices.

    Attributes:
        about: the name it is about (of two compared, the right one); "" where it is about a colour.
    """

    family: str
    about: str
    question: str
    choices: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class NamedWorld:
    """Twelve things and the metal of each colour. Of held and of tutored things alike there are as many of each
    colour, shape, size, company and food, so that no answer is right more often than another."""

    things: tuple[NamedThing, ...]
    metals: Mapping[str, str]

    def of(self, split: Split) -> tuple[NamedThing, ...]:
        """Tutored things ("train") or held ones."""
        return tuple(thing for thing in self.things if thing.is_held == (split != "train"))


@functools.cache
def named_world(seed: int) -> NamedWorld:
    """The world of a seed: which name has which looks, and which are held."""
    draw = Draw("named world", seed)
    names = draw.sample(NAMES, len(NAMES))
    things: list[NamedThing] = []
    for looks, is_held in zip(_looks(draw), (False, True), strict=True):
        sizes, company, foods = (_balanced(draw, of, len(looks)) for of in (SIZES, SHAPES, FOODS))
        for (colour, shape), size, beside, food in zip(looks, sizes, company, foods, strict=True):
            things.append(NamedThing(names[len(things)], colour, shape, size, beside, food, is_held))
    return NamedWorld(tuple(things), dict(zip(COLOURS, draw.sample(METALS, len(METALS)), strict=True)))


def _looks(draw: Draw) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Combinations of colour and shape for tutored and for held things, all different and seen in pictures; in either
    half every colour and every shape occurs once."""
    rounds: list[list[tuple[str, str]]] = []
    while len(rounds) < 2:
        pairs = list(zip(COLOURS, draw.sample(SHAPES, len(SHAPES)), strict=True))
        if set(SEEN_PAIRS).difference(*rounds).issuperset(pairs):
            rounds.append(pairs)
    return rounds[0], rounds[1]


def _balanced(draw: Draw, values: Sequence[str], count: int) -> list[str]:
    """``count`` values in any order, each as often as the others."""
    found = [values[index % len(values)] for index in range(count)]
    draw.shuffle(found)
    return found


def named_questions(seed: int, split: Split, family: str) -> tuple[NamedQuestion, ...]:
    """All questions of a family of `NAMED_FAMILIES` about tutored things ("train") or held ones, in words.

    Rules are about no thing, and are the same for both.
    """
    return _ASK[family](named_world(seed), named_world(seed).of(split))


def _property(family: str, choices: tuple[str, ...]) -> Callable[..., tuple[NamedQuestion, ...]]:
    def ask(world: NamedWorld, things: Sequence[NamedThing]) -> tuple[NamedQuestion, ...]:
        return tuple(
            NamedQuestion(family, thing.name, phrasing.format(thing.name), choices, _value(world, thing, family))
            for thing in things
            for phrasing in _PHRASINGS[family]
        )

    return ask


def _value(world: NamedWorld, thing: NamedThing, family: str) -> str:
    if family == "two_hop":
        return world.metals[thing.colour]
    return str(getattr(thing, "food" if family == "untold" else family))


def _comparison(world: NamedWorld, things: Sequence[NamedThing]) -> tuple[NamedQuestion, ...]:
    """Every thing with two of the other size, either one named first as often, asked for the larger and the smaller."""
    large, small = ([thing for thing in things if thing.size == size] for size in ("large", "small"))
    found = []
    for place, one in enumerate(large):
        for step in (0, 1):
            other = small[(place + step) % len(small)]
            pair = (one, other) if step else (other, one)
            for words, size in _COMPARED:
                for first, second in (pair, pair[::-1]):
                    right = first if first.size == size else second
                    question = f"Which is {words}, {first.name} or {second.name}?"
                    choices = (first.name, second.name)
                    found.append(NamedQuestion("comparison", right.name, question, choices, right.name))
    return tuple(found)


def _rule(world: NamedWorld, things: Sequence[NamedThing]) -> tuple[NamedQuestion, ...]:
    return tuple(
        NamedQuestion("rule", "", phrasing.format(colour), METALS, metal)
        for colour, metal in world.metals.items()
        for phrasing in _PHRASINGS["rule"]
    )


_ASK: Mapping[str, Callable[[NamedWorld, Sequence[NamedThing]], tuple[NamedQuestion, ...]]] = {
    "colour": _property("colour", COLOURS),
    "shape": _property("shape", SHAPES),
    "company": _property("company", SHAPES),
    "comparison": _comparison,
    "two_hop": _property("two_hop", METALS),
    "untold": _property("untold", FOODS),
    "rule": _rule,
}

Pairing = Literal["shown", "blind", "shuffled", "told"]


class NamedPicture(NamedTuple):
    """A picture of a named thing.

    Attributes:
        scene: the thing in the middle, and its company.
        question: who is to be seen.
        caption: the name, which tells nothing of looks.
    """

    name: str
    scene: Scene
    question: str
    caption: str


def named_picture(draw: Draw, seed: int, split: Split, thing: NamedThing | None = None) -> NamedPicture:
    """A picture of a thing, held or tutored; ``split``: of scenes for training or of others."""
    world = named_world(seed)
    while True:
        shown = thing or draw.choice(world.things)
        scene = _scene(draw, shown)
        if split_of("named", shown.name, scene) == ("train" if split == "train" else "test"):
            return NamedPicture(shown.name, scene, draw.choice(_WHO), shown.name)


def named_caption(draw: Draw, seed: int, split: Split, pairing: Pairing) -> tuple[Scene | None, Exchange]:
    """A picture and its caption (or what stands for them).

    Args:
        pairing: "shown": as they belong together. "blind": the caption without its picture. "shuffled": with a picture
            of another thing. "told": no picture, and one of the things that it would tell in words instead, put as no
            question is.
    """
    if pairing == "told":
        thing, (known, what) = draw.choice(named_world(seed).things), draw.choice(tuple(_TOLD.items()))
        return None, Exchange(draw.choice(_TELL).format(what, thing.name), str(getattr(thing, known)))
    picture = named_picture(draw, seed, split)
    exchange = Exchange(picture.question, picture.caption)
    if pairing == "blind":
        return None, exchange
    if pairing == "shuffled":
        while True:
            other = named_picture(draw, seed, split)
            if other.name != picture.name:
                return other.scene, exchange
    return picture.scene, exchange


def _scene(draw: Draw, thing: NamedThing) -> Scene:
    beside = draw.choice([colour for colour, shape in SEEN_PAIRS if shape == thing.company])
    looks = ((thing.colour, thing.shape, thing.size), (beside, thing.company, draw.choice(SIZES)))
    drawn = [
        Thing(colour, shape, size, cell, (draw.between(-1, 1), draw.between(-1, 1)))
        for (colour, shape, size), cell in zip(looks, (_MIDDLE, _MIDDLE + 1), strict=True)
    ]
    return Scene(tuple(drawn), draw.below(NUM_BACKGROUNDS))
