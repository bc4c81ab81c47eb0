"""One vocabulary of text and codes: the text's own ids first, then a range of ids for each kind of codes.

A range is begin, end, and its codes in order. All of it is arithmetic; no tokenizer is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from alula.errors import CodesError

MARKS = 2
"""ids of a range that are no codes: its begin and its end"""


@dataclass(frozen=True)
class CodeRange:
    """The ids of one kind of codes.

    Attributes:
        name: of the range.
        size: how many codes.
        tokens: codes of an item.
        streams: codebooks that take turns within an item; code i of an item is of codebook i modulo streams.
        start: id of its begin; its end and its codes follow.
    """

    name: str
    size: int
    tokens: int
    start: int
    streams: int = 1

    @property
    def begin(self) -> int:
        """Id in front of an item."""
        return self.start

    @property
    def end(self) -> int:
        """Id behind an item."""
        return self.start + 1

    @property
    def first(self) -> int:
        """Id of code 0."""
        return self.start + MARKS

    @property
    def stop(self) -> int:
        """One behind the last of its ids."""
        return self.first + self.size

    @property
    def length(self) -> int:
        """Ids of an item, begin and end included."""
        return self.tokens + MARKS

    def ids(self, codes: Iterable[int]) -> list[int]:
        """The ids of an item: begin, its codes, end.

        Raises:
            CodesError: a code that is none of its own.
        """
        found = [int(code) for code in codes]
        wrong = next((code for code in found if not 0 <= code < self.size), None)
        if wrong is not None:
            raise CodesError(f"{wrong} is no code of {self.name!r}, which has 0 to {self.size - 1}", where=self.name)
        return [self.begin, *(self.first + code for code in found), self.end]


@dataclass(frozen=True)
class Found:
    """An item in a row of ids.

    Attributes:
        name: of its range.
        codes: (T,) int64, from 0.
        start, stop: where it stands, begin and end included.
        complete: it was ended and has as many codes as an item has; what is not cannot be decoded.
    """

    name: str
    codes: Tensor
    start: int
    stop: int
    complete: bool


@dataclass(frozen=True)
class JointVocabulary:
    """Text ids 0 to text - 1, then the ranges.

    Attributes:
        text: token embeddings of the text model.
        ranges: one behind the other.
    """

    text: int
    ranges: tuple[CodeRange, ...]

    @classmethod
    def of(cls, text: int, kinds: Mapping[str, Sequence[int]]) -> JointVocabulary:
        """Of kinds by name: (size, tokens per item) or (size, tokens per item, streams)."""
        ranges, start = [], text
        for name, (size, tokens, *streams) in kinds.items():
            ranges.append(CodeRange(name, size, tokens, start, *streams))
            start = ranges[-1].stop
        return cls(text, tuple(ranges))

    @property
    def size(self) -> int:
        """All ids."""
        return self.ranges[-1].stop if self.ranges else self.text

    @cached_property
    def _by_name(self) -> dict[str, CodeRange]:
        return {each.name: each for each in self.ranges}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the ranges, in order."""
        return tuple(self._by_name)

    def __getitem__(self, name: str) -> CodeRange:
        found = self._by_name.get(name)
        if found is None:
            raise CodesError(f"no codes of the name {name!r}", remedy=f"take one of: {', '.join(self._by_name)}")
        return found

    def range_of(self, number: int) -> CodeRange | None:
        """The range that an id is of; None: text."""
        return next((each for each in self.ranges if each.start <= number < each.stop), None)

    def is_code(self, ids: Tensor) -> Tensor:
        """Bool, of ids of any shape: not text."""
        return ids >= self.text

    def found(self, ids: Sequence[int]) -> list[Found]:
        """The items in a row of ids, complete or not, in order; an item lasts up to its end or to what is not of it."""
        items, place = [], 0
        row = [int(each) for each in ids]
        while place < len(row):
            its = self.range_of(row[place])
            if its is None or row[place] != its.begin:
                place += 1
                continue
            last = place + 1
            while last < len(row) and its.first <= row[last] < its.stop:
                last += 1
            codes = torch.tensor([each - its.first for each in row[place + 1 : last]], dtype=torch.int64)
            ended = last < len(row) and row[last] == its.end
            stop = last + ended
            items.append(Found(its.name, codes, place, stop, ended and len(codes) == its.tokens))
            place = stop
        return items
