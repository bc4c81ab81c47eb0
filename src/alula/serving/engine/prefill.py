"""Prompts into caches, a piece at a time, so that a long one holds no running answer up for long.

Shapes: S tokens of the prompt, B prompts that are computed at once, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from alula.anatomy import unwrap
from alula.inputs import placed
from alula.media import MEDIA
from alula.seam import find, needs_roles
from alula.seam.dialect import cache_keyword, logits_of
from alula.seam.joining import empty_cache, forget_position_shift, position_shift
from alula.serving.engine.prompts import TOKEN_INPUTS, Prepared
from alula.serving.engine.resident import Resident
from alula.tokens import Role

_IN_PIECES = ("input_ids", "mm_token_type_ids")


class Prefill:
    """The way of one prompt into a cache.

    Attributes:
        cache: what is there so far.
        done: tokens in it.
        shift: how far positions behind the prompt run from plain ones, once it is done.
    """

    def __init__(self, resident: Resident, prepared: Prepared, piece: int, cache: Any = None, done: int = 0) -> None:
        """
        Args:
            piece: tokens that are computed at once, or about as many.
            cache: of the first `done` tokens, computed before; None: nothing was.
        """
        self._resident, self._inputs, self._length = resident, prepared.inputs, len(prepared.ids)
        self._media, self._piece = _Media(prepared), piece
        self._roles = None if prepared.roles is None else torch.tensor([prepared.roles])
        self._in_pieces = goes_in_pieces(resident, prepared)
        self.cache = empty_cache(resident.model) if cache is None else cache
        self.done, self.shift = done, 0

    @property
    def next_count(self) -> int:
        """Tokens of the next piece."""
        return self._stop() - self.done

    @property
    def is_whole(self) -> bool:
        """Whether it is a prompt of one piece, of which nothing is computed yet, and which others may stand beside."""
        return self._in_pieces and not self.done and self.next_count == self._length

    def _stop(self) -> int:
        return self._media.end_of_piece(self.done, self.done + self._piece) if self._in_pieces else self._length

    def step(self) -> Tensor | None:
        """Compute the next piece; return (V,) the logits behind the last token, once that is reached."""
        start, stop = self.done, self._stop()
        given = {name: self._inputs[name][:, start:stop] for name in _IN_PIECES if name in self._inputs}
        if stop - start == self._length:
            given |= self._inputs
        else:
            given |= self._media.between(start, stop)
        forget_position_shift(self._resident.model)
        logits = _forward(self._resident, given, self.cache, self._roles)
        self.done = stop
        if stop < self._length:
            return None
        self.shift = position_shift(unwrap(self._resident.model))
        return logits[0, -1]


def fits(prepared: Prepared, others: Sequence[Prepared], piece: int) -> bool:
    """Whether a prompt can be computed in one forward with others: not longer in all, padded, than a piece, and media
    that stand side by side."""
    every = [prepared, *others]
    if max(len(each.ids) for each in every) * len(every) > piece:
        return False
    shapes = [_Media(each).shapes for each in every if each.kinds]
    return all(shape is not None and shape == shapes[0] for shape in shapes)


def together(resident: Resident, prompts: Sequence[Prepared]) -> tuple[Tensor, Any]:
    """(B, V) the logits behind several prompts computed at once, and the cache of them, padded on the left."""
    length = max(len(each.ids) for each in prompts)

    def padded(name: str, value: int) -> Tensor:
        rows = [each.inputs.get(name, each.inputs["input_ids"].new_zeros(1, len(each.ids))) for each in prompts]
        return torch.cat([functional.pad(row, (length - row.shape[1], 0), value=value) for row in rows])

    lengths = torch.tensor([len(each.ids) for each in prompts])
    mask = (torch.arange(length) >= length - lengths[:, None]).to(torch.int64)
    given: dict[str, Any] = {
        "input_ids": padded("input_ids", next(iter(resident.ends), 0)),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
    }
    if any("mm_token_type_ids" in each.inputs for each in prompts):
        given["mm_token_type_ids"] = padded("mm_token_type_ids", 0)
    media = [_Media(each).given for each in prompts if each.kinds]
    for name in media[0] if media else ():
        given[name] = torch.cat([each[name] for each in media])
    roles = None
    if needs_roles(resident.model):  # of a base that goes by none, adapters' prompts may have some
        rows = [torch.tensor(each.roles or [int(Role.UNKNOWN)] * len(each.ids)) for each in prompts]
        roles = torch.stack([functional.pad(row, (length - len(row), 0), value=int(Role.UNKNOWN)) for row in rows])
    cache = empty_cache(resident.model)
    return _forward(resident, given, cache, roles)[:, -1], cache


def _forward(resident: Resident, given: dict[str, Any], cache: Any, roles: Tensor | None) -> Tensor:
    """(B, 1 or more, V) the logits of a forward that fills a cache. What it is given goes to the device here."""
    host = unwrap(resident.model)
    given = placed(given, next(host.parameters()))
    if "logits_to_keep" in inspect.signature(type(host).forward).parameters:
        given["logits_to_keep"] = 1
    seam = find(host)
    with nullcontext() if seam is None or roles is None else seam.given_roles(roles):
        output = host(**given, **{cache_keyword(): cache}, use_cache=True)
    return logits_of(output, where=type(host).__name__)


def goes_in_pieces(resident: Resident, prepared: Prepared) -> bool:
    """Whether a prompt may be computed in pieces, and behind what another one left: no part of it goes by what comes
    behind that part."""
    return resident.reads_in_pieces and "token_type_ids" not in prepared.inputs


def start_of_rest(prepared: Prepared, known: int) -> int:
    """How many of the first `known` tokens of a prompt may be taken from elsewhere, so that none of an item is
    missing."""
    return _Media(prepared).start_of_rest(known)


class _Media:
    """The media of a prompt, as pieces of it are given them.

    Attributes:
        given: inputs of the host that bring them, by name.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._items, self._length = prepared.items, len(prepared.ids)
        self.given: Mapping[str, Any] = {
            name: value for name, value in prepared.inputs.items() if name not in TOKEN_INPUTS
        }
        count = len(prepared.kinds)
        known = {keyword for medium in MEDIA.values() for keyword in medium.inputs} | {"image_sizes"}
        self._is_apart = (
            len(set(prepared.kinds)) == 1
            and bool((self._items >= -1).all())
            and all(
                name in known and isinstance(value, Tensor) and len(value) == count
                for name, value in self.given.items()
            )
        )
        places = (self._items != -1).nonzero()[0]
        self._first, self._last = (int(places[0]), int(places[-1])) if len(places) else (self._length, -1)

    @property
    def shapes(self) -> dict[str, Any] | None:
        """By name what inputs that stand side by side have in common; None where these cannot."""
        return {name: value.shape[1:] for name, value in self.given.items()} if self._is_apart else None

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
            return dict(self.given)
        index = torch.from_numpy(items)
        return {name: value[index] for name, value in self.given.items()}
