"""Thoughts that a model writes before its answer: found by their tags, and told from the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alula.answers import THOUGHTS

_OPEN = {before for before, _ in THOUGHTS}
_TAG = re.compile("|".join(re.escape(tag) for pair in THOUGHTS for tag in pair))
_TAIL = 32
"""tokens at the end of a prompt that may open a thought"""


@dataclass(frozen=True)
class Said:
    """What a model said, in two.

    Attributes:
        thought: what stands between tags before the answer, without the tags.
        answer: the rest.
        finished: False where the text ends inside the thought, so that there is no answer.
    """

    thought: str
    answer: str
    finished: bool


def split(text: str, *, opened: bool = False) -> Said:
    """Tell a model's thought from its answer.

    A tag opens a thought only where no answer has begun, so an answer may speak of tags. A first closing tag ends a
    thought even if nothing opened it, since some templates write the opening tag into the prompt.

    Args:
        text: what was generated, tags included.
        opened: the prompt ends inside a thought.
    """
    thoughts: list[str] = []
    answers: list[str] = []
    inside, ended, start = opened, False, 0
    for tag in _TAG.finditer(text):
        opens = tag[0] in _OPEN
        before = text[start : tag.start()]
        if opens and not inside and not "".join([*answers, before]).strip():
            inside, start = True, tag.end()
        elif not opens and (inside or not ended):
            thoughts += [*answers, before]
            answers, inside, ended, start = [], False, True, tag.end()
    (thoughts if inside else answers).append(text[start:])
    return Said("".join(thoughts).strip(), "".join(answers).strip(), not inside)


def opened(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether a prompt of these tokens ends inside a thought, as templates of models that always think leave it."""
    return str(tokenizer.decode(list(ids[-_TAIL:]))).rstrip().endswith(tuple(_OPEN))


def said(tokenizer: Any, ids: Sequence[int], *, opened: bool = False) -> Said:
    """Decode what a model generated, without special tokens, and `split` it; tags may be special tokens themselves."""
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = {number: text for number, text in special.items() if any(text in tag for pair in THOUGHTS for tag in pair)}
    if not marks:
        return split(str(tokenizer.decode(list(ids), skip_special_tokens=True)), opened=opened)
    found = split(str(tokenizer.decode([n for n in ids if n in marks or n not in special])), opened=opened)
    left = re.compile("|".join(map(re.escape, marks.values())))
    return Said(left.sub("", found.thought), left.sub("", found.answer), found.finished)
