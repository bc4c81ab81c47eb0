"""Batches without padding, and logits of the positions that are learnt from alone.

`packed` puts the samples of a padded batch side by side into one row. What several of them begin with (the system
prompt that a template writes, a picture about which they ask different things) stands there once: nothing of it depends
on what follows, so each sample's own copy would compute, and hand back in gradients, the same. `narrowed` says for
which positions a batch's labels ask for logits.

Shapes: B samples, L tokens after padding, T tokens of the row, N pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alula.data.collate import IGNORED
from alula.fingerprints import fingerprint_tensor
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
        ``input_ids``, ``position_ids``, ``labels`` (1, T) and, where it was there, ``mm_token_type_ids``: sample by
        sample, each without what an earlier one begins with as well; ``pixel_values`` without the pictures in that;
        `LAYOUT`; all else as it was, ``attention_mask`` (B, L) too: it counts the tokens of the samples, and is not
        the row's.
    """
    valid = batch["attention_mask"].bool()
    rows = [mask.nonzero()[:, 0] for mask in valid]
    given = {key: batch[key] for key in _PER_TOKEN if key in batch}
    own = {key: [value[number, at] for number, at in enumerate(rows)] for key, value in given.items()}
    for labels in own.get("labels", ()):
        labels[0] = IGNORED  # nothing comes before it
    pictures = _pictures(batch, own) if share_pictures else None
    starts = _Starts.of(own, pictures)
    members = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    firsts: list[int] = []
    places: list[Tensor] = []
    count = 0
    for number, length in enumerate(map(len, rows)):
        like, first = starts.shared(number)
        members[number, :first] = members[like, :first]
        members[number, first:length] = torch.arange(count, count + length - first)
        places.append(number * members.shape[1] + torch.arange(first, length))
        firsts.append(first)
        count += length - first
    row = {
        key: torch.cat([value[first:] for value, first in zip(values, firsts, strict=True)])[None]
        for key, values in own.items()
    }
    if pictures is not None:
        row[_PIXELS] = pictures.left(batch[_PIXELS], firsts)
    positions = torch.cat([torch.arange(first, len(at)) for at, first in zip(rows, firsts, strict=True)])[None]
    return {**batch, **row, "position_ids": positions, LAYOUT: {"members": members, "places": torch.cat(places)}}


def narrowed(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch that asks for logits where labels are, by ``logits_to_keep`` (K,) int64, counted from the end (below 0),
    since a learned prompt may stand in front of the tokens.

    ``labels`` (B, K) are those of the same columns: at each the token that the column *before it* in K is to foretell,
    as in a whole batch. Columns are kept for all samples where they are learnt from in any.
    """
    labels = batch["labels"]
    learnt = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]
    ahead = torch.cat([labels.new_full((len(labels), 1), IGNORED), labels[:, learnt + 1]], dim=1)
    last = torch.tensor([-1], device=labels.device)
    return {**batch, "labels": ahead, "logits_to_keep": torch.cat([learnt - labels.shape[1], last])}


@dataclass(frozen=True, eq=False)
class _Pictures:
    """Which picture each token of a batch stands for.

    Attributes:
        place: by sample (its tokens,) int64, in the order of ``pixel_values``; -1: none.
        alike: (N,) for each picture the first one that is the same.
        tokens: of one picture.
    """

    place: list[np.ndarray]
    alike: np.ndarray
    tokens: int

    def left(self, pixels: Tensor, firsts: Sequence[int]) -> Tensor:
        """(n, C, H, W) the pictures behind what samples begin with like earlier ones."""
        there = np.unique(np.concatenate([place[first:] for place, first in zip(self.place, firsts, strict=True)]))
        there = there[there >= 0]
        return pixels if len(there) == len(pixels) else pixels[torch.from_numpy(there)]


def _pictures(batch: Mapping[str, Any], own: Mapping[str, list[Tensor]]) -> _Pictures | None:
    """None where it cannot be told: further tensors may say how many tokens each picture has."""
    pixels, kinds = batch.get(_PIXELS), own.get("mm_token_type_ids")
    if pixels is None or kinds is None or pixels.dim() != 4 or set(batch) - {*_PER_TOKEN, _PIXELS, "attention_mask"}:
        return None
    shown = [kind.numpy() == int(Modality.IMAGE) for kind in kinds]
    counts = [int(is_image.sum()) for is_image in shown]
    tokens = sum(counts) // len(pixels)
    if not tokens or tokens * len(pixels) != sum(counts) or any(count % tokens for count in counts):
        return None
    firsts = accumulate((count // tokens for count in counts), initial=0)
    place = [
        np.where(is_image, first + (np.cumsum(is_image) - 1) // tokens, -1)
        for is_image, first in zip(shown, firsts, strict=False)
    ]
    seen: dict[str, int] = {}
    alike = np.array([seen.setdefault(fingerprint_tensor(picture), at) for at, picture in enumerate(pixels)])
    return _Pictures(place, alike, tokens)


@dataclass(frozen=True, eq=False)
class _Starts:
    """What samples begin with, as far as nothing is learnt from it. There is one column more than the longest has.

    Attributes:
        marks: (B, L + 1) the same number where samples have the same token, or token of the same picture; -1 where it
            is shared with none: it is learnt from, or it is not known what stands there, or the sample has ended.
        may_begin: (B, L + 1) bool: what comes before may stand with another sample. The token is not learnt from, as
            its predecessor in the row is another's; and no picture stands both there and before.
    """

    marks: np.ndarray
    may_begin: np.ndarray

    @classmethod
    def of(cls, own: Mapping[str, list[Tensor]], pictures: _Pictures | None) -> _Starts:
        ids = own["input_ids"]
        shape = len(ids), 1 + max(map(len, ids))
        marks, may_begin = np.full(shape, -1), np.ones(shape, dtype=bool)
        beyond = 1 + max(int(row.max()) for row in ids)  # where pictures begin
        for number, row in enumerate(ids):
            mark, may = marks[number, : len(row)], may_begin[number, : len(row)]
            mark[:] = row.numpy()
            if "mm_token_type_ids" in own:
                mark[own["mm_token_type_ids"][number].numpy() != 0] = -1
            if pictures is not None:
                place = pictures.place[number]
                is_image = place >= 0
                mark[is_image] = beyond + pictures.alike[place[is_image]]
                may[1:] = np.cumsum(is_image)[:-1] % pictures.tokens == 0
            if "labels" in own:
                is_learnt = own["labels"][number].numpy() != IGNORED
                mark[is_learnt] = -1
                may[is_learnt] = False
        return cls(marks, may_begin)

    def shared(self, number: int) -> tuple[int, int]:
        """An earlier sample that begins like this one, and with how many tokens."""
        if number == 0:
            return 0, 0
        own = self.marks[number]
        counts = ((self.marks[:number] != own) | (own < 0)).argmax(axis=1)  # they differ behind the end at the latest
        like = int(counts.argmax())
        return like, int(np.flatnonzero(self.may_begin[number, : counts[like] + 1])[-1])
