"""A batch of running answers: rows that join and leave between steps.

Shapes: B rows, L tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alula.anatomy import unwrap
from alula.seam import find
from alula.seam.dialect import cache_keyword, logits_of
from alula.seam.joining import apart, chosen, joined, take_back, uncropped
from alula.serving.engine.resident import Resident
from alula.serving.engine.sampling import Sampler, draw

_ROOM = 64  # steps that a mask has room for before it is made anew


@dataclass(eq=False)
class Row:
    """A running answer.

    Attributes:
        job: whose it is.
        sampler: draws its tokens.
        length: tokens of it in the cache.
        shift: how far its positions run from plain ones.
        token: its last one, which is in no cache yet.
    """

    job: Any
    sampler: Sampler
    length: int
    shift: int
    token: int


class Batch:
    """Rows of one model whose caches are of one kind.

    Attributes:
        resident: the model.
        rows: its rows.
        cache: of all of them.
    """

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self._host = unwrap(resident.model)
        self.rows: list[Row] = []
        self.cache: Any = None
        self._mask: Tensor | None = None  # (B, L and room) of the tokens that are no padding; None: none is
        self._tokens: Tensor | None = None  # (B,) the last ones
        self._positions: Tensor | None = None  # (B,) theirs
        self._length = 0
        self._before: dict[int, Any] = {}  # layers of the cache before a step, that cannot be cropped
        self._cache_name = cache_keyword()

    def join(self, rows: Sequence[Row], caches: Sequence[Any]) -> None:
        """Take rows in, with the caches of their prompts."""
        self.cache = joined([*([self.cache] if self.rows else []), *caches])
        self.rows += rows
        self._length = max(row.length for row in self.rows)
        self._tell()

    def leave(self, rows: Sequence[Row]) -> None:
        """Let rows go."""
        gone = {id(row) for row in rows}
        left = [place for place, row in enumerate(self.rows) if id(row) not in gone]
        self.rows = [self.rows[place] for place in left]
        if not left:
            self.cache = None
            return
        self._length = max(row.length for row in self.rows)
        self.cache = chosen(self.cache, left, self._length)
        self._tell()

    def cache_of(self, row: Row) -> Any:
        """What is in the cache of one row, in memory of its own."""
        return chosen(self.cache, [self.rows.index(row)], row.length)

    def _tell(self) -> None:
        """Bring to the device what steps go by."""
        device = self.resident.device
        lengths = torch.tensor([row.length for row in self.rows])
        self._tokens = torch.tensor([row.token for row in self.rows]).to(device)
        self._positions = (lengths + torch.tensor([row.shift for row in self.rows])).to(device)
        self._mask = None
        if bool((lengths != self._length).any()):
            places = torch.arange(self._length + _ROOM)
            self._mask = (places >= self._length - lengths[:, None]).to(torch.int64).to(device)

    def step(self) -> tuple[Tensor, list[int]]:
        """Compute a token of every row; return the logits it was drawn from, and the tokens.

        Raises:
            whatever the model does; the rows are as they were, but for the cache (`split`).
        """
        assert self._tokens is not None
        assert self._positions is not None
        self._before = uncropped(self.cache)
        logits = self._forward(self._tokens, self._positions)
        drawn, tokens = draw([row.sampler for row in self.rows], logits)
        self._before = {}
        self._length += 1
        self._tokens, self._positions = drawn, self._positions + 1
        for row, token in zip(self.rows, tokens, strict=True):
            row.length += 1
            row.token = token
        return logits, tokens

    def split(self) -> list[Batch]:
        """After a step that failed: a batch of each row, as it was before. This one is given up."""
        take_back(self.cache, self._length, self._before)
        cache, self.cache, self._before = self.cache, None, {}
        singles = []
        for row, part in zip(self.rows, apart(cache, [row.length for row in self.rows]), strict=True):
            single = Batch(self.resident)
            single.join([row], [part])
            singles.append(single)
        return singles

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(B, V) the logits behind the last tokens."""
        given: dict[str, Any] = {"input_ids": tokens[:, None], "position_ids": self._shaped(positions)}
        if self._mask is not None:
            if self._length >= self._mask.shape[1]:
                self._tell()
            given["attention_mask"] = self._mask[:, : self._length + 1]
        with self._all_of_assistants():
            output = self._host(**given, **{self._cache_name: self.cache}, use_cache=True)
        return logits_of(output, where=type(self._host).__name__)[:, -1]

    def _shaped(self, positions: Tensor) -> Tensor:
        """As the host takes them: M-RoPE goes by time, height and width."""
        sections = self.resident.position_sections
        table = positions[:, None]
        return table if sections is None else table.expand(sections, *table.shape)

    def _all_of_assistants(self) -> AbstractContextManager[None]:
        seam = find(self._host)
        if seam is None or not seam.needs_roles:
            return nullcontext()
        return seam.given_roles(torch.empty(len(self.rows), 0, dtype=torch.int64))
