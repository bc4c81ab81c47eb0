"""Deduction: orders from pairwise statements, and rules applied to individuals.

Held out by who stands where in the order, and by who is of which kind with which property.
"""

from __future__ import annotations

import itertools

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.language import article
from alula_fledgling.microworld.scenes import COLOURS
from alula_fledgling.microworld.skills.names import PEOPLE
from alula_fledgling.microworld.skills.story import Story
from alula_fledgling.microworld.splits import split_of

KINDS = ("wug", "dax", "blick", "fep", "toma", "zib", "norp", "kiki")

_ORDERS = (("older", "younger", "oldest", "youngest"), ("taller", "shorter", "tallest", "shortest"))


def deduction(draw: Draw, split: str) -> tuple[Exchange, ...]:
    return deduction_story(draw, split).asked(draw)


def deduction_story(draw: Draw, split: str) -> Story:
    """An order of three people, or rules about kinds and one individual they apply to."""
    return _order(draw, split) if draw.chance(0.5) else _rules(draw, split)


def _order(draw: Draw, split: str) -> Story:
    more, less, most, least = draw.choice(_ORDERS)
    while True:
        people = draw.sample(PEOPLE, 3)
        if split_of("order", most, *people) == split:
            break
    said = []
    for upper, lower in itertools.pairwise(people):
        said.append(f"{upper} is {more} than {lower}." if draw.chance(0.5) else f"{lower} is {less} than {upper}.")
    draw.shuffle(said)
    top, _, bottom = people
    first, second = draw.sample((top, bottom), 2)
    questions = (
        Exchange(f"Who is the {most}?", top),
        Exchange(f"Who is the {least}?", bottom),
        Exchange(f"Who is {more}, {first} or {second}?", top),
        Exchange(f"Who is {less}, {first} or {second}?", bottom),
    )
    return Story(" ".join(said), questions)


def _rules(draw: Draw, split: str) -> Story:
    while True:
        count = draw.between(2, 3)
        kinds, colours, person = draw.sample(KINDS, count), draw.sample(COLOURS, count), draw.choice(PEOPLE)
        if split_of("rule", person, kinds[0], colours[0]) == split:
            break
    rules = [f"Every {kind} is {colour}." for kind, colour in zip(kinds, colours, strict=True)]
    draw.shuffle(rules)
    member = f"{person} is {article(kinds[0])}."
    said = [*rules, member] if draw.chance(0.5) else [member, *rules]
    question = draw.choice(("What colour is {}?", "Which colour does {} have?")).format(person)
    return Story(" ".join(said), [Exchange(question, colours[0])])
