"""Which rows are keys of a learner, and which query may see which.

Keys and values of both learners are the decoder's input rows (perceptual rows for the visual learner, text rows for the
textual one), shared by all layers. Which key a query may see is decided by true position, kind and validity.

Shapes: B batch, S new rows, P cached rows, K key rows of one learner, d stream width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alula.grafts.wings.config import WingsConfig
from alula.rows import Role, RowMap
from alula.seam import Forward


@dataclass(frozen=True)
class Keys:
    """The key rows of one learner, gathered from all rows of the batch.

    Attributes:
        index: (B, K) places among the P + S rows; samples with fewer keys repeat place 0, never legal.
        legal: (B, S, K) bool: the query may see the key.
        rows: (B, K, d) input rows.
    """

    index: Tensor
    legal: Tensor
    rows: Tensor

    def pick(self, table: Tensor) -> Tensor:
        """(B, P + S, C) -> (B, K, C)."""
        return table.gather(1, self.index[..., None].expand(-1, -1, table.shape[-1]))


def gather_keys(forward: Forward, learner: str, config: WingsConfig) -> Keys | None:
    """Which of all rows are keys of `learner`, and which query may see which.

    A key is legal for a query when it stands at or before it (by true position, in the same sample) and neither is
    padding. Under the exact gate the textual learner is silent at rows that have seen nothing perceptual.
    """
    every, new = forward.all_rows, forward.rows
    chosen = every.is_perceptual if learner == "visual" else every.is_text
    if learner == "textual" and not config.system_keys:
        chosen = chosen & (every.role != Role.SYSTEM)
    most = int(chosen.sum(dim=1).max())
    if most == 0:
        return None
    # chosen rows first, in their order; the tail of samples with fewer keys is masked
    index = torch.sort((~chosen).to(torch.int8), dim=1, stable=True).indices[:, :most]
    real = chosen.gather(1, index)
    position = torch.where(real, every.position.gather(1, index), torch.iinfo(torch.int64).max)
    legal = (position[:, None, :] <= new.position[:, :, None]) & new.valid[:, :, None]
    if learner == "textual" and config.gate == "exact":
        legal = legal & seen_of_new(every, new)[:, :, None]
    inputs = forward.all_inputs()
    keys = Keys(index=index.masked_fill(~real, 0), legal=legal, rows=inputs)
    return Keys(index=keys.index, legal=legal, rows=keys.pick(inputs))


def seen_of_new(every: RowMap, new: RowMap) -> Tensor:
    """(B, S) bool: a perceptual row stands at or before this new row."""
    return every.has_seen[:, -new.shape[1] :]
