"""What models are asked: single questions, two about one picture, and conversations over three pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alula.draws import Draw
from alula.evaluation import prompts
from alula.evaluation.items import Message
from alula.inputs import Intake, Rendered
from alula_fledgling.microworld import VISUAL_FAMILIES, Item, SceneImage, dialogue_items, text_items, visual_items
from alula_fledgling.microworld.items import assistant, user
from alula_fledgling.microworld.language import ask
from alula_fledgling.microworld.scenes import SEEN_PAIRS, draw_scene, split_of_scene

SHORT, LONG = 8, 32
"""most tokens of an answer: of a word or two (the longest right one takes fewer), and of a description"""
KINDS = VISUAL_FAMILIES
DESCRIPTION = "caption"
TURNS = ("colour", "shape", "count", "position", "relation", "existence")
"""kinds of questions that one picture is asked two of"""


@dataclass(frozen=True)
class Question:
    """A prompt and its right answer.

    Attributes:
        prompt: rendered, up to the answer.
        first: of a conversation, its first turn as it was asked; None: there is one turn.
    """

    kind: str
    gold: str
    prompt: Rendered
    first: Rendered | None = None


def single(intake: Intake, count: int, seed: int) -> list[Question]:
    """So many questions of every kind about one held-out picture each."""
    items = visual_items(count * len(KINDS), split="test", seed=seed)
    return [_question(intake, item) for item in items]


def turns(intake: Intake, count: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Two questions of different kinds about each of so many held-out pictures.

    Returns:
        the second ones behind the first ones and their right answers; and asked alone.
    """
    talks: list[Question] = []
    alone: list[Question] = []
    index = 0
    while len(talks) < count:
        draw = Draw("two questions", seed, index)
        index += 1
        scene = draw_scene(draw, draw.between(2, 4), pairs=SEEN_PAIRS)
        kinds = list(TURNS)
        draw.shuffle(kinds)
        one, two = (ask(draw, kind, scene, pairs=SEEN_PAIRS) for kind in kinds[:2])
        if split_of_scene(scene) != "test" or one is None or two is None:
            continue
        picture = SceneImage(scene)
        before = [user(one.question, picture)]
        behind = [*before, assistant(one.answer), user(two.question)]
        first, whole = (_rendered(intake, messages) for messages in (before, behind))
        talks.append(Question(kinds[1], two.answer, whole, first))
        alone.append(Question(kinds[1], two.answer, _rendered(intake, [user(two.question, picture)])))
    return talks, alone


def pictures(intake: Intake, count: int, seed: int) -> list[Question]:
    """The last of three questions, each about a picture of its own."""
    return [_question(intake, item) for item in dialogue_items(count, split="test", seed=seed, patterns=["VVV"])]


def texts(intake: Intake, count: int, seed: int) -> list[Question]:
    """Questions without a picture."""
    return [_question(intake, item) for item in text_items(count, split="test", seed=seed)]


def _question(intake: Intake, item: Item) -> Question:
    last = item.targets[-1]
    return Question(last.family, last.answer, _rendered(intake, item.messages[: last.turn]))


def _rendered(intake: Intake, messages: Sequence[Message]) -> Rendered:
    return prompts.encode(intake, prompts.loaded(messages, intake))


def longest(processor: Any, questions: Sequence[Question]) -> int:
    """Tokens of the longest right answer, with the one that ends it, descriptions aside."""
    told = [question.gold for question in questions if question.kind != DESCRIPTION]
    return 1 + max(len(processor.tokenizer(gold, add_special_tokens=False)["input_ids"]) for gold in told)
