"""Numbers: arithmetic, comparison and sorting.

Held out by what is computed on, whatever the order of the operands: a pair (or a set) that is tested never occurs in
training, neither way round nor in other words.
"""

from __future__ import annotations

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.splits import split_of

LARGEST = 50
"""Operands and results of the arithmetic lie between 0 and this."""


def arithmetic(draw: Draw, split: str) -> tuple[Exchange]:
    while True:
        total = draw.between(0, LARGEST)
        part = draw.between(0, total)
        if draw.chance(0.5):
            pair = sorted((part, total - part))
            if split_of("add", *pair) != split:
                continue
            first, second = part, total - part
            phrasing = draw.choice(
                ("What is {} + {}?", "{} + {} = ?", "Add {} and {}.", "What do you get for {} plus {}?")
            )
            return (Exchange(phrasing.format(first, second), str(total)),)
        if split_of("subtract", total, min(part, total - part)) != split:
            continue
        phrasing = draw.choice(("What is {} - {}?", "{} - {} = ?", "What do you get for {} minus {}?"))
        return (Exchange(phrasing.format(total, part), str(total - part)),)


def comparison(draw: Draw, split: str) -> tuple[Exchange]:
    while True:
        first = draw.below(10 ** draw.between(1, 2))
        # close calls as often as plain ones
        second = first + draw.between(-9, 9) if draw.chance(0.4) else draw.below(10 ** draw.between(1, 2))
        if second < 0 or first == second or split_of("compare", *sorted((first, second))) != split:
            continue
        style = draw.below(3)
        if style == 0:
            question = draw.choice(
                ("Which is larger, {} or {}?", "Which number is larger: {} or {}?", "Name the larger one of {} and {}.")
            )
            answer = str(max(first, second))
        elif style == 1:
            question = draw.choice(
                (
                    "Which is smaller, {} or {}?",
                    "Which number is smaller: {} or {}?",
                    "Name the smaller one of {} and {}.",
                )
            )
            answer = str(min(first, second))
        else:
            question = "Is {} larger than {}?"
            answer = "yes" if first > second else "no"
        return (Exchange(question.format(first, second), answer),)


def sorting(draw: Draw, split: str) -> tuple[Exchange]:
    while True:
        values = draw.sample(range(10), draw.between(3, 5)) if draw.chance(0.5) else draw.sample(range(10, 100), 3)
        ordered = sorted(values)
        if split_of("sort", *ordered) == split and values != ordered and values != ordered[::-1]:
            break
    if draw.chance(0.5):
        question = draw.choice(
            ("Sort from small to large: {}", "Put in rising order: {}", "Sort these numbers upwards: {}")
        )
    else:
        question = draw.choice(
            ("Sort from large to small: {}", "Put in falling order: {}", "Sort these numbers downwards: {}")
        )
        ordered.reverse()
    return (Exchange(question.format(" ".join(map(str, values))), " ".join(map(str, ordered))),)
