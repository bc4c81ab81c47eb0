"""Sequences: reversal and pattern completion.

Reversal is held out by the sequence together with its mirror image, patterns by their terms.
"""

from __future__ import annotations

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.skills.names import WORDS
from alula_fledgling.microworld.splits import split_of


def reversal(draw: Draw, split: str) -> tuple[Exchange]:
    while True:
        if draw.chance(0.5):
            parts = draw.sample(WORDS, draw.between(3, 5))
        else:
            parts = [str(digit) for digit in draw.sample(range(10), draw.between(3, 5))]
        if split_of("reverse", *min(parts, parts[::-1])) == split:
            break
    question = draw.choice(
        ("Reverse: {}", "Say this backwards: {}", "Turn the order round: {}", "Write in reverse order: {}")
    )
    return (Exchange(question.format(" ".join(parts)), " ".join(reversed(parts))),)


def pattern(draw: Draw, split: str) -> tuple[Exchange]:
    while True:
        if draw.chance(0.5):
            step, start, shown = draw.between(1, 5), draw.below(30), draw.between(3, 5)
            values = [start + step * place for place in range(shown + 1)]
            if draw.chance(0.5):
                values.reverse()
            key: tuple[object, ...] = (values[0], values[1])
            terms = [str(value) for value in values]
        else:
            # a motif of two or three words that repeats; it may break off anywhere in its second or third round
            motif = draw.sample(WORDS, draw.between(2, 3))
            if len(motif) == 2 and draw.chance(0.4):
                motif = [motif[0], motif[0], motif[1]]
            shown = draw.between(len(motif) + 2, 2 * len(motif) + 1)
            key = tuple(motif)
            terms = [motif[place % len(motif)] for place in range(shown + 1)]
        if split_of("pattern", *key) == split:
            break
    question = draw.choice(("What comes next? {}", "Continue: {}", "Which one follows? {}", "Complete the pattern: {}"))
    return (Exchange(question.format(" ".join(terms[:-1])), terms[-1]),)
