"""How films are talked about. The answers are words that the scenes and skills of the microworld use as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alula.draws import Draw
from alula_fledgling.microworld.films import NUM_FRAMES, Actor, Film, draw_film, draw_unseen, is_unseen, split_of_film
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.language import article, listing
from alula_fledgling.microworld.scenes import SEEN_PAIRS, UNSEEN_PAIRS

FILM_FAMILIES = ("direction", "speed", "order", "event", "mover", "number", "presence", "story")
"""Which way; which is faster; which comes or goes first; what appears or leaves; what moves; how many; is there; all of
it."""

_OTHERS = ("moves", "stays", "appears", "leaves")


def film_and_question(draw: Draw, family: str, split: str) -> tuple[Film, Exchange]:
    """A film of ``split`` with a question of ``family``."""
    while True:
        acts = _ACTS[family](draw)
        unseen = draw_unseen(draw, acts[0] == "moves") if split == "unseen" else {}
        film = draw_film(draw, acts, **unseen)
        if split != "unseen" and split_of_film(film) != split:
            continue
        focus = next((actor for actor in film.actors if is_unseen(actor)), None)
        exchange = _ASK[family](draw, film, focus)
        if exchange is not None:
            return film, exchange


def story(film: Film) -> str:
    """The one canonical description of a film: what everything does, in the order of time, then of lanes."""
    actors = sorted(film.actors, key=lambda actor: (actor.frame, actor.lane))
    return listing([" ".join((article(actor.name), actor.act, actor.direction)).rstrip() for actor in actors])


def _with(*needed: str) -> Callable[[Draw], list[str]]:
    """At least these acts, and up to three in all."""
    return lambda draw: [*needed, *(draw.choice(_OTHERS) for _ in range(draw.between(0, 3 - len(needed))))]


def _two_events(draw: Draw) -> list[str]:
    act = draw.choice(("appears", "leaves"))
    return [act, act, *(draw.choice(("moves", "stays")) for _ in range(draw.below(2)))]


def _one_event(draw: Draw) -> list[str]:
    act = draw.choice(("appears", "leaves"))
    other = "leaves" if act == "appears" else "appears"
    return [act, *(draw.choice(("moves", "stays", other)) for _ in range(draw.below(3)))]


def _one_mover(draw: Draw) -> list[str]:
    return ["moves", *(draw.choice(("stays", "appears", "leaves")) for _ in range(draw.below(3)))]


def _any(most: int) -> Callable[[Draw], list[str]]:
    return lambda draw: [draw.choice(_OTHERS) for _ in range(draw.between(1, most))]


_ACTS: dict[str, Callable[[Draw], list[str]]] = {
    "direction": _with("moves"),
    "speed": _with("moves", "moves"),
    "order": _two_events,
    "event": _one_event,
    "mover": _one_mover,
    "number": _any(3),
    "presence": _any(3),
    "story": _any(2),
}


def _direction(draw: Draw, film: Film, focus: Actor | None) -> Exchange | None:
    movers = [actor for actor in film.actors if actor.act == "moves"]
    actor = focus or draw.choice(movers)
    if actor not in movers:
        return None
    question = draw.choice(("Which way does the {} move?", "Where does the {} move to?", "The {} moves which way?"))
    return Exchange(question.format(actor.name), actor.direction)


def _pair(draw: Draw, actors: Sequence[Actor], focus: Actor | None) -> tuple[Actor, Actor] | None:
    """Two of the actors in random order, the focus among them."""
    if focus is not None and focus not in actors:
        return None
    one, other = draw.sample(actors, 2)
    if focus is not None and focus not in (one, other):
        one = focus
    return one, other


def _speed(draw: Draw, film: Film, focus: Actor | None) -> Exchange | None:
    pair = _pair(draw, [actor for actor in film.actors if actor.act == "moves"], focus)
    if pair is None or pair[0].speed == pair[1].speed:
        return None
    word = draw.choice(("fast", "slow"))
    question = draw.choice(("Which is {}er, the {} or the {}?", "What moves {}er: the {} or the {}?"))
    answer = next(actor for actor in pair if actor.speed == word)
    return Exchange(question.format(word, *(actor.name for actor in pair)), answer.name)


def _order(draw: Draw, film: Film, focus: Actor | None) -> Exchange | None:
    events = [actor for actor in film.actors if actor.act in ("appears", "leaves")]
    pair = _pair(draw, events, focus)
    if pair is None or pair[0].act != pair[1].act or abs(pair[0].frame - pair[1].frame) < 2:
        return None
    word = draw.choice(("first", "last"))
    question = f"Which {pair[0].act} {word}, the {pair[0].name} or the {pair[1].name}?"
    ordered = sorted(pair, key=lambda actor: actor.frame)
    return Exchange(question, ordered[0 if word == "first" else -1].name)


def _event(draw: Draw, film: Film, focus: Actor | None) -> Exchange | None:
    act = draw.choice(("appears", "leaves"))
    there = [actor for actor in film.actors if actor.act == act]
    if len(there) != 1 or (focus is not None and focus is not there[0]):
        return None
    return Exchange(draw.choice((f"What {act}?", f"Which thing {act}?", f"Which shape {act}?")), there[0].name)


def _mover(draw: Draw, film: Film, focus: Actor | None) -> Exchange | None:
    (actor,) = (actor for actor in film.actors if actor.act == "moves")
    if focus is not None and focus is not actor:
        return None
    asked = draw.below(3)
    if asked == 0:
        return Exchange(
            draw.choice(("What colour is the thing that moves?", "What moves, which colour?")), actor.colour
        )
    if asked == 1:
        return Exchange(draw.choice(("What shape is the thing that moves?", "What moves, which shape?")), actor.shape)
    return Exchange(draw.choice(("What moves?", "Which thing moves?")), actor.name)


def _number(draw: Draw, film: Film, focus: Actor | None) -> Exchange | None:
    if focus is not None and focus.frame:  # there all the time: the count turns on knowing it for one thing
        return None
    asked = draw.below(3)
    if asked == 0:
        return Exchange("How many shapes move?", str(sum(actor.act == "moves" for actor in film.actors)))
    frame, when = ((0, "at first"), (NUM_FRAMES - 1, "at last"))[asked - 1]
    return Exchange(f"How many shapes are there {when}?", str(len(film.present(frame))))


def _presence(draw: Draw, film: Film, focus: Actor | None) -> Exchange | None:
    present = [actor.pair for actor in film.actors]
    if draw.chance(0.5):
        pair, answer = focus.pair if focus else draw.choice(present), "yes"
    else:
        # an unseen combination must not be told by never being there
        pool = sorted(UNSEEN_PAIRS) if focus is not None and focus.pair in UNSEEN_PAIRS else SEEN_PAIRS
        absent = [pair for pair in pool if pair not in present]
        near = [pair for pair in absent if any(pair[0] == p[0] or pair[1] == p[1] for p in present)]
        pair, answer = draw.choice(near if near and draw.chance(0.6) else absent), "no"
    question = draw.choice(("Is there {}?", "Do you see {}?", "Does the film show {}?"))
    return Exchange(question.format(article(" ".join(pair))), answer)


def _story(draw: Draw, film: Film, focus: Actor | None) -> Exchange:
    return Exchange(
        draw.choice(("Describe the film.", "What does the film show?", "What is to be seen?", "Give a caption.")),
        story(film),
    )


_ASK: dict[str, Callable[[Draw, Film, Actor | None], Exchange | None]] = {
    "direction": _direction,
    "speed": _speed,
    "order": _order,
    "event": _event,
    "mover": _mover,
    "number": _number,
    "presence": _presence,
    "story": _story,
}
