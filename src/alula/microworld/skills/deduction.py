"""Deduction: orders from pairwise statements, and rules applied to individuals.

Held out by who stands where in the order, and by who is of which kind with which property.
"""

from __future__ import annotations

import itertools

from alula.microworld.draws import Draw, split_of
from alula.microworld.items import Exchange
from alula.microworld.language import article
from alula.microworld.scenes import COLOURS
from alula.microworld.skills.names import PEOPLE

KINDS = ("wug", "dax", "blick", "fep", "toma", "zib", "norp", "kiki")

_ORDERS = (("older", "younger", "oldest", "youngest"), ("taller", "shorter", "tallest", "shortest"))


def deduction(draw: Draw, split: str) -> tuple[Exchange]:
    return _order(draw, split) if draw.chance(0.5) else _rule(draw, split)


def _order(draw: Draw, split: str) -> tuple[Exchange]:
    more, less, most, least = draw.choice(_ORDERS)
    while True:
        people = draw.sample(PEOPLE, 3)
        if split_of("order", most, *people) == split:
            break
    said = []
    for upper, lower in itertools.pairwise(people):
        said.append(f"{upper} is {more} than {lower}." if draw.chance(0.5) else f"{lower} is {less} than {upper}.")
    draw.shuffle(said)
    if draw.chance(0.6):
        top = draw.chance(0.5)
        question, answer = f"Who is the {most if top else least}?", people[0 if top else -1]
    else:
        word = draw.choice((more, less))
        forward = draw.chance(0.5)
        one, other = (people[0], people[-1]) if forward else (people[-1], people[0])
        question, answer = f"Is {one} {word} than {other}?", "yes" if forward == (word == more) else "no"
    return (Exchange(f"{' '.join(said)} {question}", answer),)


def _rule(draw: Draw, split: str) -> tuple[Exchange]:
    while True:
        kinds, colours, people = draw.sample(KINDS, 2), draw.sample(COLOURS, 2), draw.sample(PEOPLE, 2)
        if split_of("rule", people[0], kinds[0], colours[0]) == split:
            break
    rules = [f"All {kind}s are {colour}." for kind, colour in zip(kinds, colours, strict=True)]
    members = [f"{person} is {article(kind)}." for person, kind in zip(people, kinds, strict=True)]
    draw.shuffle(rules)
    draw.shuffle(members)
    said = [*rules, *members] if draw.chance(0.5) else [*members, *rules]
    person = people[0]
    if draw.chance(0.6):
        question, answer = draw.choice((f"What colour is {person}?", f"Which colour does {person} have?")), colours[0]
    else:
        true = draw.chance(0.5)
        question, answer = f"Is {person} {colours[0] if true else colours[1]}?", "yes" if true else "no"
    return (Exchange(f"{' '.join(said)} {question}", answer),)
