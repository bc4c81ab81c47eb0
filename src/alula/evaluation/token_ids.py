"""Token ids as result files keep them: short enough to stay there, whole enough to say where two models part.

A prompt is one row of ids or several (the choices of one question). Rows are separated by ``|``; ``7*576`` is a run of
576 times the id 7 (image tokens), and ``^12`` stands for the first 12 ids of the line before (a shared question).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Difference(NamedTuple):
    """Where two prompts part: the row and the place in it, and the id there (None: the prompt is over)."""

    row: int
    position: int
    first: int | None
    second: int | None


def write(rows: Sequence[Sequence[int]]) -> str:
    """Return ``rows`` as text."""
    before: Sequence[int] = ()
    written = []
    for row in rows:
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, row, strict=False))))
        runs = ((token, len(list(group))) for token, group in itertools.groupby(row[same:]))
        words = [f"^{same}"] if same else []
        words += [str(token) if count == 1 else f"{token}*{count}" for token, count in runs]
        written.append(" ".join(words))
        before = row
    return "|".join(written)


def read(text: str) -> list[list[int]]:
    """Return the rows that `write` wrote."""
    rows: list[list[int]] = []
    for written in text.split("|"):
        row: list[int] = []
        for word in written.split():
            if word.startswith("^"):
                row += rows[-1][: int(word[1:])]
            else:
                token, _, count = word.partition("*")
                row += [int(token)] * int(count or 1)
        rows.append(row)
    return rows


def difference(first: str, second: str) -> Difference | None:
    """Return where two written prompts part; None where they are the same."""
    if first == second:
        return None
    nothing: list[int] = []
    for number, (one, two) in enumerate(itertools.zip_longest(read(first), read(second), fillvalue=nothing)):
        for position, (left, right) in enumerate(itertools.zip_longest(one, two)):
            if left != right:
                return Difference(number, position, left, right)
    return None
