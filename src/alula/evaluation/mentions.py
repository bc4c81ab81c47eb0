"""Finding the objects a text names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from alula.errors import DataError
from alula.files import regular, unreadable

_WORD = re.compile(r"[a-z0-9]+")
_POSSESSIVE = re.compile(r"['\u2019]s\b")
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"
COCO_PHRASES: Mapping[str, str | None] = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS.split()},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "home plate": None,
}
"""Pairs of words that the published CHAIR code takes as another word, or as none: a baby bear is no person."""
_IRREGULAR = {"person": "people", "child": "children", "mouse": "mice", "goose": "geese", "foot": "feet", "ox": "oxen"}


class ObjectWords:
    """The words that name objects.

    The longest phrase wins (a hot dog is no dog), in the singular or the plural, whatever the case.

    Args:
        synonyms: object -> the words and phrases that name it; the object's own name is always one.
        phrases: phrase -> the word it is to be taken as, or None where it names nothing.
    """

    def __init__(self, synonyms: Mapping[str, Sequence[str]], phrases: Mapping[str, str | None] | None = None) -> None:
        self.objects = tuple(synonyms)
        self._named: dict[tuple[str, ...], str | None] = {}
        for name, words in synonyms.items():
            for phrase in (name, *words):
                for form in _forms(_words(phrase)):
                    self._named.setdefault(form, name)
        taken = dict(self._named)
        for phrase, meant in (phrases or {}).items():
            stands_for = taken.get(tuple(_words(meant))) if meant is not None else None
            for form in _forms(_words(phrase)):
                self._named.setdefault(form, stands_for)
        self._longest = max(map(len, self._named), default=0)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ObjectWords:
        """Read a file as published for CHAIR: per line an object and its synonyms, separated by commas.

        The published rules for pairs of words (`COCO_PHRASES`) are added.

        Raises:
            DataError: the file cannot be read or holds nothing.
        """
        try:
            lines = regular(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(error, path, DataError) from error
        rows = [[word.strip() for word in line.split(",") if word.strip()] for line in lines]
        synonyms = {row[0]: row[1:] for row in rows if row}
        if not synonyms:
            raise DataError(
                "holds no synonyms", where=os.fspath(path), remedy="write one object and its synonyms per line"
            )
        return cls(synonyms, COCO_PHRASES)

    def object_of(self, category: str) -> str | None:
        """Return the object a category's name stands for, or None."""
        return self._named.get(tuple(_words(category)))

    def find(self, text: str) -> list[str]:
        """Return the objects ``text`` names, in order, as often as it names them."""
        return [name for name in self._scan(_words(text)) if name is not None]

    def _scan(self, words: Sequence[str]) -> Iterator[str | None]:
        place = 0
        while place < len(words):
            for size in range(min(self._longest, len(words) - place), 0, -1):
                phrase = tuple(words[place : place + size])
                if phrase in self._named:
                    yield self._named[phrase]
                    place += size
                    break
            else:
                place += 1


def count_words(text: str) -> int:
    """Return the number of words of ``text``, as separated by white space."""
    return len(text.split())


def _words(text: str) -> list[str]:
    return _WORD.findall(_POSSESSIVE.sub("", text.lower()))


def _forms(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The phrase, and the phrase with its last word in the plural."""
    if not words:
        return
    *head, last = words
    yield (*head, last)
    for plural in _plurals(last):
        yield (*head, plural)


def _plurals(word: str) -> Iterator[str]:
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    elif word.endswith("man"):
        yield f"{word[:-2]}en"
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        yield f"{word}es"
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        yield f"{word[:-1]}ies"
    else:
        yield f"{word}s"
        if word.endswith("o"):
            yield f"{word}es"
        elif word.endswith("fe"):
            yield f"{word[:-2]}ves"
        elif word.endswith("f"):
            yield f"{word[:-1]}ves"
