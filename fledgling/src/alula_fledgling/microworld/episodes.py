"""Episodes: pictures to be remembered, which obey a rule that nothing else tells, and questions about the rule.

A rule gives three shapes a colour each, or three colours a shape; every picture of an episode shows one of the three.
The words beside a picture say nothing of it, so that whoever does not look can only guess. One rule in eight is held
out.
"""

from __future__ import annotations

from typing import NamedTuple

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.scenes import COLOURS, SEEN_PAIRS, SHAPES, Scene, draw_scene
from alula_fledgling.microworld.splits import split_of

EPISODE_FAMILIES = ("colour", "shape")
RULE = 3
"""shapes that a rule gives a colour, or colours that it gives a shape"""
MOST_SHOTS = 6
"""pictures of a streamed episode, at least one"""
SHOWN = Exchange("Remember the picture.", "I will.")


class Episode(NamedTuple):
    """Pictures, and what is asked behind them.

    Attributes:
        shots: pictures, each with its words.
        questions: about what was shown, each with its answer.
    """

    shots: list[tuple[Scene, Exchange]]
    questions: list[Exchange]


def episode(draw: Draw, family: str, split: str, shots: int) -> Episode:
    """An episode with so many pictures.

    Args:
        family: a member of ``EPISODE_FAMILIES``: what is asked for.
        split: "train" or "test": of the rule.
        shots: of all parts of the rule in turn, those of each turn in any order.
    """
    keys = SHAPES if family == "colour" else COLOURS
    rule: list[tuple[str, str]] = []
    while not rule or split_of("rule", family, *sorted(rule)) != split:
        rule = [draw.choice([pair for pair in SEEN_PAIRS if key in pair]) for key in draw.sample(keys, RULE)]
    shown: list[tuple[str, str]] = []
    while len(shown) < shots:
        turn = list(rule)
        draw.shuffle(turn)
        shown += turn[: shots - len(shown)]
    asked = [pair for pair in rule if pair in shown]
    draw.shuffle(asked)
    words = "What colour is the {1}?" if family == "colour" else "Which shape is {0}?"
    return Episode(
        [(draw_scene(draw, 1, pairs=[pair]), SHOWN) for pair in shown],
        [Exchange(words.format(*pair), pair[0] if family == "colour" else pair[1]) for pair in asked],
    )
