"""Batches without padding, and logits of the positions that are learnt from alone.

`packed` puts the samples of a padded batch side by side into one row. What several of them begin with (the system
prompt that a template writes, a picture about which they ask different things) stands there once: nothing of it depends
on what follows, so each sample's own copy would compute, and hand back in gradients, the same. `narrowed` says for
which positions a batch's labels ask for logits.

Shapes: B samples, L tokens after padding, T tokens of the row, N pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alula.data.collate import IGNORED
from alula.tokens import Modality

LAYOUT = "packed_layout"
"""in packed batches, where tokens stand: ``members`` and ``places`` (see `alula.seam.packed`)"""
_PER_TOKEN = ("input_ids", "labels", "mm_token_type_ids")
_PIXELS = "pixel_values"


def packed(batch: Mapping[str, Any], *, share_pictures: bool = True) -> dict[str, Any]:
    """A padded batch as one row.

    Args:
        batch: as `alula.data.Collator` makes it for training.
        share_pictures: samples that begin alike may share a picture; not where what the tower makes of one depends on
            how often it is in the batch. Only pictures of one size each, without further tensors beside them, are.

    Returns:
        ``input_ids``, ``position_ids``, ``labels`` (1, T) and, where it was there, ``mm_token_type_ids``;
        ``pixel_values`` in the order of the row, a picture that is shared once; `LAYOUT`; all else as it was,
        ``attention_mask`` (B, L) too: it counts the tokens of the samples, and is not the row's.
    """
    valid = batch["attention_mask"].bool()
    rows = [mask.nonzero()[:, 0] for mask in valid]
    given = {key: batch[key] for key in _PER_TOKEN if key in batch}
    own = {key: [value[number, at] for number, at in enumerate(rows)] for key, value in given.items()}
    pictures = _pictures(batch, own) if share_pictures else None
    starts = _Starts.of(own, pictures)
    members = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    places: list[Tensor] = []
    stretches = list(starts.stretches())
    begins = accumulate((stop - start for _, start, stop in stretches), initial=0)
    for begin, (samples, start, stop) in zip(begins, stretches, strict=False):
        members[list(samples), start:stop] = torch.arange(begin, begin + stop - start)
        places.append(samples[0] * members.shape[1] + torch.arange(start, stop))
    for labels in own.get("labels", ()):
        labels[0] = IGNORED  # nothing comes before it
    row = {
        key: torch.cat([values[samples[0]][start:stop] for samples, start, stop in stretches])[None]
        for key, values in own.items()
    }
    if pictures is not None:
        row[_PIXELS] = pictures.of(batch[_PIXELS], stretches)
    positions = torch.cat([torch.arange(start, stop) for _, start, stop in stretches])[None]
    return {**batch, **row, "position_ids": positions, LAYOUT: {"members": members, "places": torch.cat(places)}}


def narrowed(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch that asks for logits where labels are, by ``logits_to_keep`` (K,) int64.

    ``labels`` (B, K) are those of the same columns: at each the token that the column *before it* in K is to foretell,
    as in a whole batch. Columns are kept for all samples where they are learnt from in any.
    """
    labels = batch["labels"]
    learnt = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]
    ahead = torch.cat([labels.new_full((len(labels), 1), IGNORED), labels[:, learnt + 1]], dim=1)
    last = torch.tensor([labels.shape[1] - 1], device=labels.device)
    return {**batch, "labels": ahead, "logits_to_keep": torch.cat([learnt, last])}


class _Stretch(NamedTuple):
    """Tokens `start` to `stop` of some samples, which are the same in all of these."""

    samples: Sequence[int]
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class _Pictures:
    """Which picture each token of a batch stands for.

    Attributes:
        place: by sample (its tokens,) int64, in the order of ``pixel_values``; -1: none.
        alike: (N,) for each picture the first one that is the same.
    """

    place: list[np.ndarray]
    alike: np.ndarray

    def of(self, pixels: Tensor, stretches: Sequence[_Stretch]) -> Tensor:
        """(n, C, H, W) the pictures that stand in stretches, in that order."""
        there = [np.unique(self.place[samples[0]][start:stop]) for samples, start, stop in stretches]
        order = np.concatenate(there)
        order = order[order >= 0]
        return pixels if np.array_equal(order, np.arange(len(pixels))) else pixels[torch.from_numpy(order)]


def _pictures(batch: Mapping[str, Any], own: Mapping[str, list[Tensor]]) -> _Pictures | None:
    """None where it cannot be told: further tensors may say how many tokens each picture has."""
    pixels, kinds = batch.get(_PIXELS), own.get("mm_token_type_ids")
    if pixels is None or kinds is None or pixels.dim() != 4 or set(batch) - {*_PER_TOKEN, _PIXELS, "attention_mask"}:
        return None
    counts = [int((kind == int(Modality.IMAGE)).sum()) for kind in kinds]
    tokens = sum(counts) // len(pixels)  # of one
    if not tokens or tokens * len(pixels) != sum(counts) or any(count % tokens for count in counts):
        return None
    place, first = [], 0
    for kind, count in zip(kinds, counts, strict=True):
        of_sample = np.full(len(kind), -1)
        of_sample[(kind == int(Modality.IMAGE)).numpy()] = first + np.arange(count) // tokens
        place.append(of_sample)
        first += count // tokens
    seen: dict[bytes, int] = {}
    return _Pictures(place, np.array([seen.setdefault(_digest(picture), at) for at, picture in enumerate(pixels)]))


def _digest(picture: Tensor) -> bytes:
    return hashlib.blake2b(picture.contiguous().view(torch.uint8).numpy().data, digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class _Starts:
    """What samples begin with, as far as nothing is learnt from it.

    Attributes:
        lengths: of the samples.
        marks: (B, L) the same number where samples have the same token, or token of the same picture; -1 where it is
            shared with none: it is learnt from, or it is not known what stands there, or the sample has ended.
        is_whole: (B, L) bool: no picture stands both there and before.
    """

    lengths: list[int]
    marks: np.ndarray
    is_whole: np.ndarray

    @classmethod
    def of(cls, own: Mapping[str, list[Tensor]], pictures: _Pictures | None) -> _Starts:
        ids = own["input_ids"]
        lengths = [len(row) for row in ids]
        marks, is_whole = np.full((len(ids), max(lengths)), -1), np.ones((len(ids), max(lengths)), dtype=bool)
        beyond = 1 + max(int(row.max()) for row in ids)  # where pictures begin
        for number, (row, length) in enumerate(zip(ids, lengths, strict=True)):
            mark = row.numpy().copy()
            if "mm_token_type_ids" in own:
                mark[own["mm_token_type_ids"][number].numpy() != 0] = -1
            if pictures is not None:
                place = pictures.place[number]
                mark[place >= 0] = beyond + pictures.alike[place[place >= 0]]
                is_whole[number, 1:length] = (place[1:] != place[:-1]) | (place[1:] < 0)
            if "labels" in own:
                mark[own["labels"][number].numpy() != IGNORED] = -1
            marks[number, :length] = mark
        return cls(lengths, marks, is_whole)

    def stretches(self) -> Iterator[_Stretch]:
        """All tokens of all samples, each of which stands in one of the stretches, and those of a sample in order."""
        waiting = [(tuple(range(len(self.lengths))), 0, 0)]
        while waiting:
            samples, start, known = waiting.pop()
            if len(samples) == 1:
                yield _Stretch(samples, start, self.lengths[samples[0]])
                continue
            end = self._end(samples, known)
            stop = self._cut(samples, start, end)
            if stop > start:
                yield _Stretch(samples, start, stop)
            waiting += [(part, stop, end) for part in reversed(self._parts(samples, end))]

    def _end(self, samples: Sequence[int], known: int) -> int:
        """With how many tokens samples begin alike, which do with those `known`."""
        there = self.marks[list(samples), known:]
        differ = np.flatnonzero((there != there[0]).any(axis=0) | (there[0] < 0))
        return known + (int(differ[0]) if len(differ) else there.shape[1])

    def _cut(self, samples: Sequence[int], start: int, end: int) -> int:
        """How many of these tokens may stand once: the next one is learnt from in no sample, for what comes before it
        in the row is another's; and a picture stands there as a whole, or not at all."""
        at = list(samples)
        stop = end if end < self.marks.shape[1] and (self.marks[at, end] >= 0).all() else end - 1
        while stop > start and not self.is_whole[at, stop].all():
            stop -= 1
        return max(stop, start)

    def _parts(self, samples: Sequence[int], end: int) -> list[tuple[int, ...]]:
        """Those that go on alike behind the tokens that all begin with, in order."""
        parts: dict[int, list[int]] = {}
        for sample in samples:
            mark = int(self.marks[sample, end]) if end < self.marks.shape[1] else -1
            parts.setdefault(mark if mark >= 0 else -1 - sample, []).append(sample)
        return [tuple(part) for part in parts.values()]
