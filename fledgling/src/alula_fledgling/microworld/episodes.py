"""Episodes: pictures with made-up words for what is in them, by a rule that only the pictures tell.

A rule gives three colours (or three shapes) a made-up word each. Pictures are shown and called by their words; then it
is asked what a word means. Every episode has a rule of its own. Of each colour (and shape) one word in eight is held
out: test episodes ask for a pair that no training episode held, so that rules cannot be learnt by heart.
"""

from __future__ import annotations

from typing import NamedTuple

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.scenes import COLOURS, SEEN_PAIRS, SHAPES, Scene, draw_scene, split_of_scene
from alula_fledgling.microworld.skills.deduction import KINDS

EPISODE_FAMILIES = ("colour", "shape")
WORDS = 3
"""of a rule"""
MOST_SHOTS = 6
"""pictures of a streamed episode; at least one for each word"""


class Episode(NamedTuple):
    """Pictures called by their words, and what is asked behind them.

    Attributes:
        shots: pictures, each with the question and the word that answers it.
        questions: about words, each with its answer; the last one is about a pair of the episode's split.
    """

    shots: list[tuple[Scene, Exchange]]
    questions: list[Exchange]


def rule_pairs(family: str, split: str) -> list[tuple[str, str]]:
    """The pairs of a value and a word that an episode of a split asks for."""
    values = COLOURS if family == "colour" else SHAPES
    return [
        (value, word)
        for i, value in enumerate(values)
        for j, word in enumerate(KINDS)
        if ((i + j) % len(KINDS) == 0) is (split == "test")
    ]


def episode(draw: Draw, family: str, split: str, shots: int) -> Episode:
    """An episode with so many pictures; the first k of them are such an episode with k.

    Args:
        family: a member of ``EPISODE_FAMILIES``: what the rule goes by.
        split: "train" or "test": of the pair that is asked for last. All pictures are of the training split's.
        shots: of all words in turn, those of each turn in any order.
    """
    rule = [draw.choice(rule_pairs(family, split))]
    while len(rule) < WORDS:
        values, words = zip(*rule, strict=True)
        rule.append(
            draw.choice(
                [pair for pair in rule_pairs(family, "train") if pair[0] not in values and pair[1] not in words]
            )
        )
    shown: list[tuple[str, str]] = []
    while len(shown) < shots:
        turn = list(rule)
        draw.shuffle(turn)
        shown += turn
    asked = rule[1:]
    draw.shuffle(asked)
    return Episode(
        [(_picture(draw, value), Exchange("Which word?", word)) for value, word in shown[:shots]],
        [Exchange(f"Which {family} is a {word}?", value) for value, word in (*asked, rule[0])],
    )


def _picture(draw: Draw, value: str) -> Scene:
    """One thing of that colour or shape."""
    pairs = [pair for pair in SEEN_PAIRS if value in pair]
    while True:
        scene = draw_scene(draw, 1, pairs=pairs)
        if split_of_scene(scene) == "train":
            return scene
