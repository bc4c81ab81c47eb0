"""Where the learners look: sums of their attention over sets of keys, for probes that ask (seam.LearnerSumsReader)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alula.grafts.wings.rope import rotate
from alula.seam import ForwardContext

if TYPE_CHECKING:
    from alula.grafts.wings.keys import Plan
    from alula.grafts.wings.layer import WingsLayer


def wants_mass(layer: WingsLayer, forward: ForwardContext) -> bool:
    """Whether anybody listens to this layer's learners."""
    return bool(_listeners(layer, forward))


def _listeners(layer: WingsLayer, forward: ForwardContext) -> list[Any]:
    return [asker for asker in forward.askers(layer.index) if hasattr(asker, "on_learner_sums")]


@torch.no_grad()
def report_mass(
    layer: WingsLayer,
    forward: ForwardContext,
    plan: Plan,
    asked: Tensor,
    keys: Mapping[str, Tensor],
    share: Tensor | None,
) -> None:
    """Tell every listening asker of this layer what it wants to know about the learners' attention.

    Args:
        asked: (B, T, d) what the learners are asked with, in the plan's order.
        keys: (B, H, K, D) by learner, ready to be asked.
        share: the router's weights, broadcastable to (B, S, learners with keys); None for a single one (1).
    """
    for listener in _listeners(layer, forward):
        columns = listener.learner_key_values(forward, layer.index)
        if columns is not None:
            for place, learner in enumerate(plan.keys):
                sums = attention_sums(layer, forward, plan, learner, asked, keys[learner], columns)
                weight = sums.new_ones(()) if share is None else share[..., place : place + 1]
                listener.on_learner_sums(forward, layer.index, weight * layer.config.gain, sums)


def attention_sums(
    layer: WingsLayer, forward: ForwardContext, plan: Plan, learner: str, asked: Tensor, keys: Tensor, columns: Tensor
) -> Tensor:
    """(B, S, H, C) sums of a learner's attention over (B, P + S, C) columns; 0 at tokens where it is silent.

    The learner's own queries and keys attend to columns in the place of values, without dropout.
    """
    lorra: Any = layer.get_submodule(learner)
    q = lorra.heads(asked + lorra.q(asked))
    tables = layer.angles(forward, plan)
    if tables is not None:
        q = rotate(q, tables.queries)
    legal = plan.keys[learner].legal
    speaks = legal.any(dim=-1, keepdim=True)
    values = plan.pick(learner, columns.to(q))
    sums = [
        F.scaled_dot_product_attention(
            q,
            keys.to(q.dtype),
            F.pad(part, (0, lorra.head_dim - part.shape[-1]))[:, None].expand(-1, q.shape[1], -1, -1),
            attn_mask=(legal | ~speaks)[:, None],
            scale=lorra.head_dim**-0.5,
        )[..., : part.shape[-1]]
        for part in values.split(lorra.head_dim, dim=-1)
    ]
    return plan.restore(torch.cat(sums, dim=-1).transpose(1, 2) * speaks[..., None])
