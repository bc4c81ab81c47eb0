"""Exercises: drills of the school that no examination asks for.

Most skills of the microworld need one thing first, to find in what was just read the entry that belongs to a name. The
drill asks for that alone, many entries at a time, with words of all sorts on either side. A model that was never
drilled answers with some entry, not the right one, for most of its schooling.
"""

from __future__ import annotations

import itertools

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.scenes import COLOURS, POSITIONS, SHAPES
from alula_fledgling.microworld.skills.deduction import KINDS
from alula_fledgling.microworld.skills.facts import LANDS, PROPERTIES
from alula_fledgling.microworld.skills.names import PEOPLE, WORDS
from alula_fledgling.microworld.skills.story import Story

_SORTS = (PEOPLE, WORDS, LANDS, COLOURS, SHAPES, KINDS, POSITIONS)
_ANY = tuple(
    dict.fromkeys((*PEOPLE, *WORDS, *LANDS, *COLOURS, *SHAPES, *KINDS, *itertools.chain(*PROPERTIES.values())))
)
_ENTRIES = ("{0}: {1}.", "{0} has {1}.", "{0} is {1}.", "{1} is at the {0}.", "{1} belongs to {0}.", "{0}, {1};")


def recital(draw: Draw, split: str) -> tuple[Exchange]:
    """Words without sense, said again and again: as they were, or as pairs in another order.

    Only what was read before tells what comes next, and nothing else about these words helps, which is what makes a
    young model look back at all.
    """
    count = draw.between(3, 6)
    words = draw.sample(_ANY, 2 * count)
    pairs = list(zip(words[::2], words[1::2], strict=True))
    shuffled = draw.chance(0.5)
    said: list[str] = []
    for _ in range(3):
        said += [word for pair in pairs for word in pair]
        if shuffled:
            draw.shuffle(pairs)
    return (Exchange("Recite.", " ".join(said)),)


def lookup(draw: Draw, split: str) -> tuple[Exchange, ...]:
    """Entries of keys and values in one wording, then some of the keys, one a turn; the answer is the key's value."""
    keys, values = draw.sample(_SORTS, 2) if draw.chance(0.5) else (_ANY[::2], _ANY[1::2])
    count = draw.between(2, 4)
    entries = list(zip(draw.sample(keys, count), draw.sample(values, count), strict=True))
    wording = draw.choice(_ENTRIES)
    said = " ".join(wording.format(key, value) for key, value in entries)
    question = draw.choice(("Look up {}.", "Which one for {}?", "Find {}."))
    return Story(said, [Exchange(question.format(key), value) for key, value in entries]).asked(draw, count)
