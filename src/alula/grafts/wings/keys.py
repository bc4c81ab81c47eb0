"""Which rows are keys of a learner, and which query may see which.

Keys and values of both learners are the decoder's input rows (perceptual rows for the visual learner, text rows for
the textual one), shared by all layers. Which key a query may see is decided by true position, kind and validity. In
the order of their positions, the keys a query may see are always the first so many: one number per query says it all.

Shapes: B batch, S new rows, P cached rows, K key rows of one learner, d stream width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from alula.errors import UsageError
from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.lorra import Angles, Block, narrow_angles, split_queries
from alula.rows import Role, RowMap
from alula.seam import Forward


@dataclass(frozen=True)
class Keys:
    """The key rows of one learner, gathered from all rows of the batch.

    Attributes:
        index: (B, K) places among the P + S rows, in the order of their positions; samples with fewer keys are filled
            up with place 0, which no query may see.
        counts: (B, S) how many keys, from the first on, each query may see.
        blocks: the queries in blocks, with the number of keys each block needs.
        rows: (B, K, d) input rows.
    """

    index: Tensor
    counts: Tensor
    blocks: list[Block]
    rows: Tensor
    _angles: dict[str, tuple[Angles, Angles]] = field(default_factory=dict)

    @property
    def legal(self) -> Tensor:
        """(B, S, K) bool: the query may see the key."""
        return torch.arange(self.index.shape[1], device=self.index.device) < self.counts[..., None]

    def pick(self, table: Tensor) -> Tensor:
        """(B, P + S, C) -> (B, K, C)."""
        return table.gather(1, self.index[..., None].expand(-1, -1, table.shape[-1]))

    def angles(self, forward: Forward, layer_type: str, host_dim: int, head_dim: int) -> tuple[Angles, Angles] | None:
        """RoPE angles of the queries and of the keys for heads of `head_dim`; None for hosts without RoPE."""
        if layer_type not in self._angles:
            tables = forward.all_rope(layer_type)
            if tables is None:
                return None
            cos, sin = narrow_angles(tables, host_dim, head_dim)
            new = forward.rows.shape[1]
            dtype = self.rows.dtype
            of_queries = Angles.of(cos[:, -new:], sin[:, -new:], dtype)
            self._angles[layer_type] = of_queries, Angles.of(self.pick(cos), self.pick(sin), dtype)
        return self._angles[layer_type]


def gather_keys(forward: Forward, learner: str, config: WingsConfig) -> Keys | None:
    """The keys of `learner`, and how many of them each query may see; None when the batch has none.

    A key is legal for a query when it stands at or before it (by true position, in the same sample) and neither is
    padding. Under the exact gate the textual learner is silent at rows that have seen nothing perceptual.
    """
    every, new = forward.all_rows, forward.rows
    chosen = chosen_rows(every, learner, config)
    most = int(chosen.sum(dim=1).max())
    if most == 0:
        return None
    # chosen rows first, in their order; then what fills up samples with fewer keys
    index = torch.sort((~chosen).to(torch.int8), dim=1, stable=True).indices[:, :most]
    real = chosen.gather(1, index)
    position = torch.where(real, every.position.gather(1, index), torch.iinfo(torch.int64).max)
    counts = torch.searchsorted(position, new.position.contiguous(), right=True)  # 0 at padding, whose position is -1
    if learner == "textual" and config.gate == "exact":
        counts = counts * every.has_seen[:, -new.shape[1] :]
    index = index.masked_fill(~real, 0)
    inputs = prepared(forward.all_inputs(), config)
    rows = inputs.gather(1, index[..., None].expand(-1, -1, inputs.shape[-1]))
    return Keys(index, counts, split_queries(counts), rows)


def chosen_rows(rows: RowMap, learner: str, config: WingsConfig) -> Tensor:
    """(B, S) bool: the row is a key of `learner`."""
    if learner == "visual":
        return rows.is_perceptual
    if config.system_keys:
        return rows.is_text
    if not bool((rows.role != Role.UNKNOWN).any()):
        raise UsageError(
            "wings: system_keys=False leaves out the system prompt, but nothing says which rows it is",
            remedy="pass row_map=RowMap.from_kinds(..., roles=...) to the model, or leave system_keys at True",
        )
    return rows.is_text & (rows.role != Role.SYSTEM)


def prepared(x: Tensor, config: WingsConfig) -> Tensor:
    """(.., d) stream or input rows as the learners take them."""
    # an eps of our own: torch's default is the dtype's, which in bfloat16 is larger than an embedding's mean square
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) if config.normalize else x
