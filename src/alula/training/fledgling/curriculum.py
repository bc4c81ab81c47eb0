"""What the fledgling's language model reads at school: long dialogues of mixed skills with distractions in between.

A lesson is one row of tokens, cut at a fixed length: questions of all text families follow each other as turns of one
dialogue. Before some questions stands unrelated material, in the same turn or a turn of its own: words without sense,
the description of a scene nobody asks about, or a run of foreign rows. Foreign rows are placeholder tokens whose
embeddings the school replaces by vectors that are no word's; their number is up to what a picture occupies. Without
them, a question after a picture would be the first thing of its kind the model ever met.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from alula.microworld.draws import Draw
from alula.microworld.language import QUESTION_KINDS, ask, describe
from alula.microworld.scenes import COLOURS, SHAPES, SIZES, draw_number, draw_scene
from alula.microworld.skills import SKILLS
from alula.microworld.skills.facts import LANDS
from alula.microworld.skills.names import PEOPLE, WORDS
from alula.training.fledgling.exercises import lookup, recital
from alula.training.fledgling.tokenizer import END, IMAGE, START, token_id

SHARES: Mapping[str, float] = {
    "facts": 0.6,
    "two_hop": 1.5,
    "arithmetic": 1.8,
    "comparison": 0.8,
    "sorting": 0.8,
    "reversal": 0.5,
    "pattern": 1.2,
    "deduction": 2.2,
    "reading": 3.2,
    "memory": 0.4,
    "lookup": 1.0,
}
"""How often each family is asked, relative to the others; what comes last is asked most."""

DRILLED: Mapping[str, float] = {**SHARES, "recital": 3.0, "lookup": 3.0}
"""The shares while the skills are still to form."""

LESSONS = {**SKILLS, "recital": recital, "lookup": lookup}

SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You answer questions about pictures and words.")


@dataclass(frozen=True)
class Curriculum:
    """How lessons are put together.

    Attributes:
        length: tokens in a lesson.
        distraction: share of questions with unrelated material before them.
        foreign_rows: most foreign rows in one place.
        shares: relative frequency of the families.
    """

    length: int = 192
    distraction: float = 0.3
    foreign_rows: int = 28
    shares: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))


@dataclass(frozen=True)
class Lessons:
    """A batch of lessons: ids (B, L) int64, and labels (B, L) int64, -100 where nothing is to be learned."""

    ids: np.ndarray
    labels: np.ndarray


class Turn(NamedTuple):
    """One exchange as it stands in a lesson; ``learned`` is false where the answer cannot be known."""

    question: str
    answer: str
    learned: bool = True

    def __str__(self) -> str:
        return f"{START}user{self.question}{END}{START}assistant {self.answer}{END}"


def lessons(
    tokenizer: PreTrainedTokenizerFast, curriculum: Curriculum, *, seed: int, batch_size: int
) -> Iterator[Lessons]:
    """Batches of lessons without end; batch n is a pure function of the seed."""
    start, assistant, end = (token_id(tokenizer, token) for token in (START, "assistant", END))
    families = tuple(curriculum.shares)
    edges = tuple(itertools.accumulate(curriculum.shares[family] for family in families))
    for batch in itertools.count():
        dialogues = [
            _dialogue(Draw("school", seed, batch * batch_size + row), curriculum, families, edges)
            for row in range(batch_size)
        ]
        texts = ["".join(map(str, turns)) for turns in dialogues]
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = np.array([encoding.ids[: curriculum.length] for encoding in encoded], dtype=np.int64)
        learned = [[turn.learned for turn in turns if isinstance(turn, Turn)] for turns in dialogues]
        yield Lessons(ids, answer_labels(ids, learned, start=start, assistant=assistant, end=end))


def answer_labels(
    ids: np.ndarray, learned: Sequence[Sequence[bool]], *, start: int, assistant: int, end: int
) -> np.ndarray:
    """``ids`` (B, L) where an assistant speaks, its closing token included; -100 elsewhere.

    Args:
        learned: per row and answer, whether it is labelled.
        start, assistant, end: ids of the header's two tokens and of the token that closes a turn.
    """
    labels = np.full_like(ids, -100)
    headers = (ids[:, :-1] == start) & (ids[:, 1:] == assistant)
    for row, flags in enumerate(learned):
        ends = np.flatnonzero(ids[row] == end)
        for first, flag in zip(np.flatnonzero(headers[row]) + 2, flags, strict=False):
            if flag:
                closing = ends[np.searchsorted(ends, first) :][:1]
                stop = int(closing[0]) + 1 if len(closing) else ids.shape[1]
                labels[row, first:stop] = ids[row, first:stop]
    return labels


def _dialogue(draw: Draw, curriculum: Curriculum, families: Sequence[str], edges: Sequence[float]) -> list[Turn | str]:
    """A dialogue at least as long as a lesson."""
    turns: list[Turn | str] = []
    if draw.chance(0.1):
        turns.append(f"{START}system {draw.choice(SYSTEM_PROMPTS)}{END}")
    room = curriculum.length
    while room > 0:
        family = families[bisect.bisect(edges, draw.below(1 << 20) / (1 << 20) * edges[-1])]
        before = ""
        if draw.chance(curriculum.distraction):
            if draw.chance(0.35):
                turns.append(_picture_turn(draw, curriculum))
                room -= _least_tokens(str(turns[-1]))
            else:
                before = _distraction(draw, curriculum)
        for question, answer in LESSONS[family](draw, "train"):
            turns.append(Turn(f"{before} {question}", answer))
            room -= _least_tokens(str(turns[-1]))
            before = ""
    return turns


def _least_tokens(text: str) -> int:
    """A bound from below: every blank begins a token, and so does every special token."""
    return text.count(" ") + text.count("<")


def _distraction(draw: Draw, curriculum: Curriculum) -> str:
    """Material before a question that has nothing to do with it."""
    kind = draw.below(3)
    if kind == 0:
        return IMAGE * draw.between(4, curriculum.foreign_rows)
    if kind == 1:
        return f" {word_salad(draw, draw.between(3, curriculum.foreign_rows))}"
    return f" {describe(draw, draw_scene(draw, draw.between(1, 4)))}"


def word_salad(draw: Draw, length: int) -> str:
    """``length`` words of one sort that make no sense together."""
    vocabulary = draw.choice((WORDS, PEOPLE, LANDS, COLOURS, tuple("0123456789"), SHAPES + COLOURS + SIZES))
    return " ".join(draw.choice(vocabulary) for _ in range(length)) + "."


def _picture_turn(draw: Draw, curriculum: Curriculum) -> Turn:
    """A turn about a picture that shows nothing the model could know: foreign rows, a question, some answer."""
    while True:
        kind = draw.choice(QUESTION_KINDS)
        scene = draw_number(draw) if kind == "digits" else draw_scene(draw, draw.between(1, 4))
        exchange = ask(draw, kind, scene)
        if exchange is not None:
            rows = IMAGE * draw.between(curriculum.foreign_rows // 2, curriculum.foreign_rows)
            return Turn(f"{rows} {exchange.question}", exchange.answer, learned=False)
