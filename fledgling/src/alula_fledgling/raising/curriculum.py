"""What the fledgling's language model reads at school: long dialogues of mixed skills with distractions in between.

A lesson is one row of tokens, cut at a fixed length, that holds exchanges of all text families one after the other: as
texts of their own that do not see each other, or as the turns of one dialogue. A story is told once and asked about
several times. In dialogues, unrelated material stands before some questions, in the same turn or a turn of its own:
words without sense, the description of a scene nobody asks about, or a run of foreign rows. Foreign rows are
placeholder tokens whose embeddings the school replaces by vectors that are no word's; their number is up to what a
picture occupies. Without them, a question after a picture would be the first thing of its kind the model ever met.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from alula.draws import Draw
from alula_fledgling.microworld.items import Exchange
from alula_fledgling.microworld.language import QUESTION_KINDS, ask, describe
from alula_fledgling.microworld.scenes import COLOURS, SHAPES, SIZES, draw_number, draw_scene
from alula_fledgling.microworld.skills import SKILLS
from alula_fledgling.microworld.skills.deduction import deduction_story
from alula_fledgling.microworld.skills.facts import LANDS, two_hop_story
from alula_fledgling.microworld.skills.names import PEOPLE, WORDS
from alula_fledgling.microworld.skills.reading import reading_story
from alula_fledgling.microworld.skills.story import Story
from alula_fledgling.raising.exercises import lookup, recital
from alula_fledgling.raising.tokenizer import END, IMAGE, START, token_id

SHARES: Mapping[str, float] = {
    "facts": 0.5,
    "two_hop": 1.0,
    "arithmetic": 2.0,
    "comparison": 1.0,
    "sorting": 0.8,
    "reversal": 0.3,
    "pattern": 1.3,
    "deduction": 1.6,
    "reading": 4.5,
    "memory": 0.4,
    "lookup": 1.0,
}
"""How often each family is asked, relative to the others; what comes last is asked most."""

DRILLED: Mapping[str, float] = {**SHARES, "recital": 1.5, "lookup": 20.0}
"""The shares while looking up is still to form."""

SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You answer questions about pictures and words.")

MOST_QUESTIONS = 3

_LESSONS = {**SKILLS, "recital": recital, "lookup": lookup}
_STORIES: Mapping[str, Callable[[Draw, str], Story]] = {
    "two_hop": two_hop_story,
    "deduction": deduction_story,
    "reading": partial(reading_story, questions=MOST_QUESTIONS),
}


@dataclass(frozen=True)
class Curriculum:
    """How lessons are put together.

    Attributes:
        length: tokens in a lesson.
        apart: whether exchanges are texts of their own, which do not see each other, or turns of one dialogue.
        distraction: share of questions with unrelated material before them.
        foreign_tokens: most foreign rows in one place.
        shares: relative frequency of the families.
    """

    length: int = 144
    apart: bool = False
    distraction: float = 0.3
    foreign_tokens: int = 28
    shares: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))


@dataclass(frozen=True)
class Lessons:
    """A batch of lessons.

    Attributes:
        ids: (B, L) int64.
        labels: (B, L) int64, -100 where nothing is to be learned.
        weights: (B, L) float32, what each label counts; 0 where nothing is to be learned.
        positions: (B, L) int64, starting again at 0 with every text that is apart from the others.
    """

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    positions: np.ndarray


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
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_padding()  # a tokenizer that has padded once goes on doing so
    shape = (batch_size, curriculum.length)
    for batch in itertools.count():
        ids, positions = np.empty(shape, np.int64), np.empty(shape, np.int64)
        rows = [
            _texts(Draw("school", seed, batch * batch_size + row), curriculum, families, edges)
            for row in range(batch_size)
        ]
        encoded = iter(encoder.encode_batch_fast(["".join(map(str, text)) for row in rows for text in row]))
        for place, row in enumerate(rows):
            parts = [next(encoded).ids for _ in row]
            tokens = list(itertools.chain.from_iterable(parts))
            counted = itertools.chain.from_iterable(map(range, map(len, parts if curriculum.apart else [tokens])))
            ids[place] = tokens[: curriculum.length]
            positions[place] = list(itertools.islice(counted, curriculum.length))
        learned = [[turn.learned for text in row for turn in text if isinstance(turn, Turn)] for row in rows]
        yield Lessons(ids, *answer_labels(ids, learned, start=start, assistant=assistant, end=end), positions)


def answer_labels(
    ids: np.ndarray, learned: Sequence[Sequence[bool]], *, start: int, assistant: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """``ids`` (B, L) where an assistant speaks, its closing token included, -100 elsewhere; and what each counts.

    A token of an answer of n tokens counts n ** -0.35: in a plain mean the long recitals drown the yes and no that are
    harder to come by; answers of equal weight would leave sorting and reversal behind.

    Args:
        learned: per row and answer, whether it is labelled.
        start, assistant, end: ids of the header's two tokens and of the token that closes a turn.
    """
    labels, weights = np.full_like(ids, -100), np.zeros(ids.shape, np.float32)
    headers = (ids[:, :-1] == start) & (ids[:, 1:] == assistant)
    for row, flags in enumerate(learned):
        ends = np.flatnonzero(ids[row] == end)
        for first, flag in zip(np.flatnonzero(headers[row]) + 2, flags, strict=False):
            if flag:
                closing = ends[np.searchsorted(ends, first) :][:1]
                stop = int(closing[0]) + 1 if len(closing) else ids.shape[1]
                labels[row, first:stop] = ids[row, first:stop]
                weights[row, first:stop] = max(1, stop - first) ** -0.35
    return labels, weights


def _texts(
    draw: Draw, curriculum: Curriculum, families: Sequence[str], edges: Sequence[float]
) -> list[list[Turn | str]]:
    """Exchanges that together are at least as long as a lesson, each with what stands before it."""
    texts: list[list[Turn | str]] = []
    room = curriculum.length
    while room > 0:
        turns: list[Turn | str] = []
        if (curriculum.apart or not texts) and draw.chance(0.1):
            turns.append(f"{START}system {draw.choice(SYSTEM_PROMPTS)}{END}")
        family = families[bisect.bisect(edges, draw.below(1 << 20) / (1 << 20) * edges[-1])]
        before = ""
        if draw.chance(curriculum.distraction):
            if draw.chance(0.35):
                turns.append(_picture_turn(draw, curriculum))
            else:
                before = _distraction(draw, curriculum)
        for question, answer in _exchanges(draw, family):
            turns.append(Turn(f"{before} {question}", answer))
            before = ""
        room -= sum(_least_tokens(str(turn)) for turn in turns)
        texts.append(turns)
    return texts


def _exchanges(draw: Draw, family: str) -> tuple[Exchange, ...]:
    """One training item of a family, with up to ``MOST_QUESTIONS`` questions where it tells a story."""
    if family in _STORIES:
        return _STORIES[family](draw, "train").asked(draw, MOST_QUESTIONS)
    return _LESSONS[family](draw, "train")


def _least_tokens(text: str) -> int:
    """A bound from below: every blank begins a token, and so does every special token."""
    return text.count(" ") + text.count("<")


def _distraction(draw: Draw, curriculum: Curriculum) -> str:
    """Material before a question that has nothing to do with it."""
    kind = draw.below(3)
    if kind == 0:
        return IMAGE * draw.between(4, curriculum.foreign_tokens)
    if kind == 1:
        return f" {word_salad(draw, draw.between(3, curriculum.foreign_tokens))}"
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
            rows = IMAGE * draw.between(curriculum.foreign_tokens // 2, curriculum.foreign_tokens)
            return Turn(f"{rows} {exchange.question}", exchange.answer, learned=False)
