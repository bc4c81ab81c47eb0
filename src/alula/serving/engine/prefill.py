"""Prompts into caches, a piece at a time, so that a long one holds no running answer up for long.

Shapes: S tokens of the prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alula.anatomy import unwrap
from alula.media import MEDIA
from alula.seam import find
from alula.seam.dialect import cache_keyword, logits_of
from alula.seam.joining import empty_cache, position_shift
from alula.serving.engine.prompts import Prepared
from alula.serving.engine.residents import Resident

_OF_TOKENS = ("input_ids", "mm_token_type_ids")
_WHOLE = ("attention_mask", "token_type_ids")
PIECE = 512
"""tokens that are computed between two steps of running answers"""


class Prefill:
    """The way of one prompt into a cache.

    Attributes:
        cache: what is there so far.
        done: tokens in it.
        shift: how far positions behind the prompt run from plain ones, once it is done.
    """

    def __init__(self, resident: Resident, prepared: Prepared, cache: Any = None, done: int = 0) -> None:
        """
        Args:
            cache: of the first `done` tokens, computed before; None: nothing was.
        """
        self._resident, self._inputs, self._length = resident, prepared.inputs, len(prepared.ids)
        self._media = _Media(prepared)
        self._roles = prepared.roles
        self._in_pieces = goes_in_pieces(resident, prepared)
        self.cache = empty_cache(resident.model) if cache is None else cache
        self.done, self.shift = done, 0

    @property
    def next_count(self) -> int:
        """Tokens of the next piece."""
        return self._stop() - self.done

    def _stop(self) -> int:
        return self._media.end_of_piece(self.done, self.done + PIECE) if self._in_pieces else self._length

    def step(self) -> Tensor | None:
        """Compute the next piece; return (V,) the logits behind the last token, once that is reached."""
        start, stop = self.done, self._stop()
        given = {name: self._inputs[name][:, start:stop] for name in _OF_TOKENS if name in self._inputs}
        if stop - start == self._length:
            given |= self._inputs
        else:
            given |= self._media.between(start, stop)
        host = unwrap(self._resident.model)
        if "logits_to_keep" in inspect.signature(type(host).forward).parameters:
            given["logits_to_keep"] = 1
        with self._with_roles():
            output = host(**given, **{cache_keyword(): self.cache}, use_cache=True)
        self.done = stop
        if stop < self._length:
            return None
        self.shift = position_shift(host)
        return logits_of(output, where=type(host).__name__)[0, -1]

    def _with_roles(self) -> AbstractContextManager[None]:
        seam = find(self._resident.model)
        if seam is None or self._roles is None:
            return nullcontext()
        return seam.given_roles(torch.tensor([self._roles]))


def goes_in_pieces(resident: Resident, prepared: Prepared) -> bool:
    """Whether a prompt may be computed in pieces, and behind what another one left: no part of it goes by what comes
    behind that part."""
    return resident.reads_in_pieces and "token_type_ids" not in prepared.inputs


def start_of_rest(prepared: Prepared, known: int) -> int:
    """How many of the first `known` tokens of a prompt may be taken from elsewhere, so that none of an item is
    missing."""
    return _Media(prepared).start_of_rest(known)


class _Media:
    """The media of a prompt, as pieces of it are given them."""

    def __init__(self, prepared: Prepared) -> None:
        self._items, self._length = prepared.items, len(prepared.ids)
        self._given: Mapping[str, Any] = {
            name: value for name, value in prepared.inputs.items() if name not in _OF_TOKENS + _WHOLE
        }
        count = len(prepared.kinds)
        known = {keyword for medium in MEDIA.values() for keyword in medium.inputs} | {"image_sizes"}
        self._is_apart = (
            len(set(prepared.kinds)) == 1
            and bool((self._items >= -1).all())
            and all(
                name in known and isinstance(value, Tensor) and len(value) == count
                for name, value in self._given.items()
            )
        )
        places = (self._items != -1).nonzero()[0]
        self._first, self._last = (int(places[0]), int(places[-1])) if len(places) else (self._length, -1)

    def end_of_piece(self, start: int, stop: int) -> int:
        """Where a piece that begins at one place ends, at about another: behind an item, not in it."""
        stop = min(stop, self._length)
        if not self._is_apart:
            return max(stop, self._last + 1) if start <= self._last and stop > self._first else stop
        last = self._items[stop - 1]
        if last >= 0:
            stop = int((self._items == last).nonzero()[0][-1]) + 1
        return stop

    def start_of_rest(self, known: int) -> int:
        """As the function of that name."""
        if not self._is_apart:
            return min(known, self._first) if known <= self._last else known
        if 0 < known < self._length and self._items[known] >= 0:
            return min(known, int((self._items == self._items[known]).nonzero()[0][0]))
        return known

    def between(self, start: int, stop: int) -> dict[str, Any]:
        """What the host is given of media in a piece."""
        items = np.unique(self._items[start:stop])
        items = items[items != -1]
        if not len(items):
            return {}
        if not self._is_apart:
            return dict(self._given)
        index = torch.from_numpy(items)
        return {name: value[index.to(value.device)] for name, value in self._given.items()}
