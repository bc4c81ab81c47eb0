"""Batches without padding, and logits of the positions that are learnt from alone.

`packed` puts the samples of a padded batch side by side into one row. What all of them begin with (the system prompt
that a template writes) stands there once: nothing of it depends on what follows, so each sample's own copy would
compute, and hand back in gradients, the same. `narrowed` says for which positions a batch's labels ask for logits.

Shapes: B samples, L tokens after padding, T tokens of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alula.data.collate import IGNORED

LAYOUT = "packed_layout"
"""in packed batches, where tokens stand: ``members`` and ``places`` (see `alula.seam.packed`)"""
_PER_TOKEN = ("input_ids", "labels", "mm_token_type_ids")


def packed(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A padded batch as one row.

    Returns:
        ``input_ids``, ``position_ids``, ``labels`` (1, T) and, where it was there, ``mm_token_type_ids``; `LAYOUT`;
        all else as it was, ``attention_mask`` (B, L) too: it counts the tokens of the samples, and is not the row's.
    """
    valid = batch["attention_mask"].bool()
    rows = [mask.nonzero()[:, 0] for mask in valid]
    given = {key: batch[key] for key in _PER_TOKEN if key in batch}
    own = {key: [value[number, at] for number, at in enumerate(rows)] for key, value in given.items()}
    shared = _shared(own)
    lengths, firsts = [len(row) for row in rows], [0, *([shared] * (len(rows) - 1))]
    members = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    places: list[Tensor] = []
    positions: list[Tensor] = []
    start = 0
    for number, (length, first) in enumerate(zip(lengths, firsts, strict=True)):
        members[number, :first] = torch.arange(first)
        members[number, first:length] = torch.arange(start, start + length - first)
        positions.append(torch.arange(first, length))
        places.append(number * members.shape[1] + positions[-1])
        start += length - first
    for labels in own.get("labels", ()):
        labels[0] = IGNORED  # nothing comes before it
    row = {
        key: torch.cat([value[first:] for value, first in zip(values, firsts, strict=True)])[None]
        for key, values in own.items()
    }
    layout = {"members": members, "places": torch.cat(places)}
    return {**batch, **row, "position_ids": torch.cat(positions)[None], LAYOUT: layout}


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


def _shared(own: Mapping[str, list[Tensor]]) -> int:
    """With how many tokens all samples begin alike; text alone, of which nothing is learnt from."""
    ids, first = own["input_ids"], own["input_ids"][0]
    if len(ids) == 1:
        return 0
    shortest = min(map(len, ids))
    alike = torch.stack([row[:shortest] == first[:shortest] for row in ids]).all(dim=0)
    for key, free in (("labels", IGNORED), ("mm_token_type_ids", 0)):
        if key in own:
            alike &= torch.stack([row[:shortest] == free for row in own[key]]).all(dim=0)
    count = int(alike.long().cumprod(0).sum())
    return max(min(count, shortest) - 1, 0)  # the token behind it is learnt from in no sample either
