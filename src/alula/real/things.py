"""Which pictures are of a thing that training never shows, by the words of their captions."""

from __future__ import annotations

import re
from typing import Literal

from alula.real.held_out import TEST, VALIDATION

Split = Literal["train", "validation", "test"]

_WORD = re.compile(r"[a-z]+")
_NO_THINGS = frozenset(
    """
    the and with for from one two three four five six seven eight nine ten its that this are was has have your our you
    who which when while into onto over under out off not very some any all more than them they his her their can red
    orange yellow green blue purple pink brown black white gray grey gold silver small large big little old new young
    left right open closed heavy light dark medium set wearing playing happy sad
    """.split()  # noqa: SIM905
)
_IRREGULAR = {"children": "child", "knives": "knife", "teeth": "tooth"}
"""plurals of what is held out that no rule makes"""


def words_of(caption: str) -> list[str]:
    """The words of a caption that may name a thing: lower case, of three letters and more, plurals as singulars."""
    return _words(re.split(r"[.!?;:(]", caption.lower().strip())[0])


def _words(text: str) -> list[str]:
    return [_singular(word) for word in _WORD.findall(text) if len(word) > 2 and word not in _NO_THINGS]


def split_of(caption: str) -> Split | None:
    """The split of a picture with that caption; None where it has to be left out.

    The last word of a caption's first phrase that may name a thing is its thing. Things of `TEST` and `VALIDATION` are
    held out: what is of one goes there, and what names one beside another thing, anywhere in its caption, goes nowhere,
    so that no caption that is trained on names a thing of the test.
    """
    words, named = words_of(caption), set(_words(caption.lower()))
    if not words:
        return None
    if words[-1] in TEST:
        return "test"
    if words[-1] in VALIDATION:
        return None if TEST & named else "validation"
    return None if (TEST | VALIDATION) & named else "train"


def names_held_out(text: str) -> bool:
    """Whether a text names a thing of `TEST` or `VALIDATION`."""
    return bool((TEST | VALIDATION) & set(_words(text.lower())))


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word
