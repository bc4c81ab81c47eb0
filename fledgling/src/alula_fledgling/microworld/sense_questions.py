"""How clouds, depth, normals, rides and responses are talked about, in words that scenes and films use as well.

Maps without a picture show no colors, so their things are told apart by shape alone; nothing is asked of a medium that
it does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange, Sense
from alula_fledgling.microworld.language import article, ask, listing
from alula_fledgling.microworld.reliefs import Cloud, DepthMap, NormalMap, Relief, ReliefImage, draw_relief
from alula_fledgling.microworld.responses import Response
from alula_fledgling.microworld.rides import Recording, draw_ride, split_of_ride
from alula_fledgling.microworld.scenes import PAIRS, SEEN_PAIRS, UNSEEN_PAIRS, Scene, Thing, draw_scene, split_of_scene
from alula_fledgling.microworld.splits import split_of

_COLORED = ("colour", "shape", "count", "position", "relation", "existence", "caption")
SENSE_FAMILIES: dict[str, tuple[str, ...]] = {
    "points": (*_COLORED, "nearness"),
    "depth": ("form", "number", "place", "nearness", "caption"),
    "depth_pictured": (*_COLORED, "nearness"),
    "normals": ("form", "number", "place", "facing", "caption"),
    "normals_pictured": (*_COLORED, "facing"),
    "motion": ("heading", "pace", "turn", "journey"),
    "response": _COLORED,
}
"""Source -> what is asked of its medium."""

COLORLESS = ("depth", "normals", "motion")
"""Sources that show no colors, and so no combinations of them that training has not shown"""

_UNSEEN = tuple(pair for pair in PAIRS if pair in UNSEEN_PAIRS)
_NOUNS = {"points": "cloud", "depth": "map", "normals": "map", "response": "picture"}
_MAKERS: dict[str, Any] = {"points": Cloud, "depth": DepthMap, "normals": NormalMap}


class Asked(NamedTuple):
    """A medium, the picture beside it where there is one, and a question with its answer."""

    medium: Sense
    clip: Any
    picture: Any
    exchange: Exchange


def sense_and_question(draw: Draw, source: str, family: str, split: str) -> Asked:
    """A medium of ``split`` with a question of ``family``.

    Args:
        source: a key of `SENSE_FAMILIES`.
    """
    name, _, pictured = source.partition("_")
    medium: Sense = name  # type: ignore[assignment]
    if medium == "motion":
        return _ridden(draw, family, split)
    while True:
        scene, focus = _scene(draw, family, split, colored=source not in COLORLESS)
        if scene is None:
            continue
        relief = draw_relief(draw, scene)
        exchange = _question(draw, family, relief, focus, colored=source not in COLORLESS, noun=_NOUNS[medium])
        if exchange is not None:
            clip = Response(scene, draw.below(1000)) if medium == "response" else _MAKERS[medium](relief)
            return Asked(medium, clip, ReliefImage(relief) if pictured else None, exchange)


def _scene(draw: Draw, family: str, split: str, *, colored: bool) -> tuple[Scene | None, Thing | None]:
    """A scene of the split, and the thing that a question must turn on; None where another is to be drawn."""
    count = draw.between(2 if family in ("relation", "nearness") else 1, 3)
    if not colored:
        scene = draw_scene(draw, count)
        shapes = ";".join(f"{thing.size} {thing.shape} {thing.cell}" for thing in scene.things)
        good = len({thing.shape for thing in scene.things}) == count and split_of("shapes", shapes) == split
        return scene if good else None, None
    new = draw.choice(_UNSEEN) if split == "unseen" else None
    scene = draw_scene(draw, count, pairs=SEEN_PAIRS, alike=family == "count", first=new)
    if new is None and split_of_scene(scene) != split:
        return None, None
    return scene, next((thing for thing in scene.things if thing.pair == new), None)


def _question(
    draw: Draw, family: str, relief: Relief, focus: Thing | None, *, colored: bool, noun: str
) -> Exchange | None:
    things, name = relief.scene.things, (lambda thing: thing.name if colored else thing.shape)
    if family in ("nearness", "facing"):
        return _in_space(draw, family, relief, focus, [name(thing) for thing in things])
    if colored:
        pairs: Sequence[tuple[str, str]] = _UNSEEN if focus else SEEN_PAIRS
        exchange = ask(draw, family, relief.scene, focus=focus, pairs=pairs)
        return exchange and Exchange(exchange.question.replace("picture", noun), exchange.answer)
    thing = draw.choice(things)
    match family:
        case "form":
            question = draw.choice(("What shape is at the {}?", "Which shape is at the {}?")).format(thing.position)
            return Exchange(question, thing.shape)
        case "number":
            return Exchange(draw.choice(("How many shapes are there?", "Count the shapes.")), str(len(things)))
        case "place":
            return Exchange(
                draw.choice(("Where is the {}?", "At which place is the {}?")).format(thing.shape), thing.position
            )
    told = listing([f"{article(f'{thing.size} {thing.shape}')} at the {thing.position}" for thing in things])
    return Exchange(draw.choice((f"Describe the {noun}.", f"What does the {noun} show?", "Give a caption.")), told)


def _in_space(draw: Draw, family: str, relief: Relief, focus: Thing | None, names: Sequence[str]) -> Exchange | None:
    """What only distance or direction tells."""
    order = draw.sample(range(len(names)), len(names))
    if focus is not None:  # among those that are asked about
        order.sort(key=lambda number: relief.scene.things[number] is not focus)
    if family == "facing":
        asked = draw.choice(("Which way does the {} face?", "Where does the {} face to?")).format(names[order[0]])
        return Exchange(asked, relief.plates[order[0]].faces)
    pair = draw.sample(order[:2], 2)
    word, pick = draw.choice((("nearer", min), ("further away", max)))
    question = draw.choice(("Which is {}, the {} or the {}?", "What is {}: the {} or the {}?"))
    answer = pick(pair, key=lambda number: relief.plates[number].distance)
    return Exchange(question.format(word, *(names[number] for number in pair)), names[answer])


def _ridden(draw: Draw, family: str, split: str) -> Asked:
    while True:
        ride = draw_ride(draw)
        if split_of_ride(ride) == split:
            break
    actor = ride.actor
    turned = f"turns {ride.turn}" if ride.turn else "does not turn"
    match family:
        case "heading":
            said = draw.choice(("Which way does it move?", "Where does it move to?")), actor.direction
        case "pace":
            said = draw.choice(("Is it fast or slow?", "Does it move fast or slow?")), actor.speed
        case "turn":
            said = draw.choice(("Does it turn left, right or not?", "Which way does it turn?")), ride.turn or "not"
        case _:
            told = f"it moves {actor.direction}, is {actor.speed} and {turned}"
            said = draw.choice(("Describe the motion.", "What happens?")), told
    return Asked("motion", Recording(ride), None, Exchange(*said))
