"""Dialogue with memory: something is said, something else comes up, then it is asked for.

Held out by the pair of things told; the answer stands only in an earlier turn.
"""

from __future__ import annotations

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.scenes import COLOURS
from alula_fledgling.microworld.skills import facts, numbers, sequences
from alula_fledgling.microworld.skills.names import PEOPLE, WORDS
from alula_fledgling.microworld.splits import split_of

_ASIDES = (facts.fact, numbers.comparison, sequences.reversal)


def memory(draw: Draw, split: str) -> tuple[Exchange, ...]:
    """Three or four exchanges: two tell something, at times another question comes up, the last one asks."""
    while True:
        person, thing = draw.choice(PEOPLE), draw.choice(WORDS)
        colour, number = draw.choice(COLOURS), str(draw.below(100))
        contents = {"name": person, "thing": f"{colour} {thing}", "number": number}
        told = draw.sample(tuple(contents), 2)
        if split_of("memory", *sorted(contents[what] for what in told)) == split:
            break
    tellings = {
        "name": Exchange(draw.choice(("My name is {}.", "I am {}.", "Call me {}.")).format(person), f"Hello {person}."),
        "thing": Exchange(draw.choice(("I have a {0} {1}.", "My {1} is {0}.")).format(colour, thing), "I see."),
        "number": Exchange(draw.choice(("Remember the number {}.", "Keep {} in mind.")).format(number), "I will."),
    }
    askings = {
        "name": Exchange(draw.choice(("What is my name?", "Who am I?")), person),
        "thing": Exchange(
            draw.choice(("What colour is my {}?", "Which colour does my {} have?")).format(thing), colour
        ),
        "number": Exchange(draw.choice(("Which number did I tell you?", "What was the number?")), number),
    }
    turns = [tellings[what] for what in told]
    if draw.chance(0.5):
        turns.insert(draw.between(1, 2), draw.choice(_ASIDES)(draw, split)[0])
    return (*turns, askings[draw.choice(told)])
