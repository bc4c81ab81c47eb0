"""Attention without positions, and a uniform share (FEATHER, arXiv 2412.13180)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from alula.errors import HostError, UsageError
from alula.policies.base import Stand
from alula.policies.criteria.attention import last_query
from alula.policies.criteria.base import Scored
from alula.policies.criteria.candidates import Candidates, Scene
from alula.seam import LayerView
from alula.settings import Int


class RopeFreeAttention(Scored):
    """In the first stage every `stride`-th row and column of an image stays; else, and besides, those tokens that the
    last token would attend to most if no position were rotated into queries and keys, in the layer before.

    FEATHER: rotated, late tokens win over what they show. The attention is a softmax over the tokens that compete,
    mean over heads. As many stay as are wanted, the uniform ones among them.

    Attributes:
        stride: of the uniform share, from the image's corner (every stride * stride-th token where its rows are not
            known); None: there is none.
    """

    name: Literal["rope_free_attention"] = "rope_free_attention"
    stride: Int | None = Field(default=3, ge=2)
    is_of_images: ClassVar[bool] = True

    @property
    def reads_before(self) -> bool:
        return True

    def place(self, stand: Stand, layer: int) -> None:
        if not stand.anatomy.rotates:
            raise HostError(
                f"{type(stand.anatomy.decoder).__name__} does not rotate positions into queries and keys, so attention "
                "without them is the one it has",
                remedy='choose by "last_query_attention"',
            )
        stand.heads(layer - 1, _Reader(stand.owner))

    def scores(self, scene: Scene, candidates: Candidates) -> Tensor:
        logits = candidates.gather(scene.noted("rope-free logits"))
        barred = ~candidates.real[..., None]
        scores = logits.masked_fill(barred, -torch.inf).softmax(dim=1).masked_fill(barred, 0).mean(dim=2)
        return scores if self.stride is None else scores + candidates.table(self._uniform(candidates))

    def _uniform(self, candidates: Candidates) -> list[np.ndarray]:
        """1 for the tokens of the uniform share, more than any attention."""
        assert self.stride is not None
        found = []
        for group, count, wanted in zip(candidates.groups, candidates.counts, candidates.wanted, strict=True):
            share = np.zeros(count, dtype=np.float32)
            if count == group.size and group.rows > 1:
                share.reshape(group.rows, group.columns)[:: self.stride, :: self.stride] = 1
            elif count == group.size:
                share[:: self.stride**2] = 1
            if share.sum() > wanted:
                raise UsageError(
                    f"every {self.stride}th row and column are {int(share.sum())} tokens of an image of {count}, of "
                    f"which {wanted} are to stay",
                    where="stride",
                    remedy="give a larger stride, or None",
                )
            found.append(share)
        return found


class _Reader:
    """Notes what the last token asks of the others, positions taken out."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def on_heads(self, view: LayerView, query: Tensor, key: Tensor, scaling: float) -> None:
        ctx = view.ctx
        if not ctx.new_media:
            return
        cos, sin = (view.pick(table) for table in ctx.rope[ctx.anatomy.layer_type(view.layer)])
        in_pairs = ctx.anatomy.turns_neighbors
        query, key = (_unrotated(each.to(torch.float32), cos, sin, in_pairs=in_pairs) for each in (query, key))
        last = view.rows(last_query(view))[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        asks = query.gather(2, last).view(len(key), key.shape[1], -1, key.shape[3])
        logits = (asks @ key.mT * scaling).flatten(1, 2)  # (B, H, M)
        ctx.memo[self.owner, "rope-free logits", view.layer] = view.spread(logits.mT)


def _unrotated(heads: Tensor, cos: Tensor, sin: Tensor, *, in_pairs: bool) -> Tensor:
    """(B, H, M, D) queries or keys as they were before their first R channels were rotated by (B or 1, M, R) angles.

    Channels come in another order where neighbors are rotated: alike for queries and keys, which is all that counts.
    """
    width = cos.shape[-1]
    cos, sin = (table[:, None, :, : width // 2].to(heads) for table in (cos, sin))
    rotated, rest = heads[..., :width], heads[..., width:]
    one, other = (rotated[..., ::2], rotated[..., 1::2]) if in_pairs else rotated.chunk(2, dim=-1)
    scale = cos.square() + sin.square()  # not 1 where the host scales its tables (YaRN)
    return torch.cat([(one * cos + other * sin) / scale, (other * cos - one * sin) / scale, rest], dim=-1)
