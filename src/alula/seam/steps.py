"""What a step of generation asks of decoder layers that tokens were taken out of: next to nothing.

Where nobody takes out the one new token, a layer runs as the host's own, beside as many keys as its cache layer holds.
That is found out once, for all layers of a forward: between two layers their weights push all else out of a processor's
caches, so what little is asked there costs several times what it does in a loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from alula.seam.context import ForwardContext, Standing
from alula.seam.lanes import Coming, LeanLayer
from alula.seam.requests import Request, Worker


class Lean(NamedTuple):
    """A layer that holds the keys of some tokens.

    Attributes:
        layer: of the cache.
        coming: what it is told before the step is in it.
        standing: the tokens in it, as the forward is told it.
    """

    layer: LeanLayer
    coming: Coming
    standing: Standing


@torch.compiler.disable  # bookkeeping on the host: nothing in it to fuse
def free_layers(ctx: ForwardContext) -> Mapping[int, Lean | None]:
    """The decoder layers that the token of a step goes through as it does without anybody who takes tokens out, unless
    the host masks keys; None: the layer holds all of these. Empty where a forward is no step."""
    if not ctx.is_step:
        return {}
    held = getattr(ctx.layer_cache, "layers", None) or []
    free: dict[int, Lean | None] = {}
    for index in range(ctx.anatomy.num_layers):
        if not _rest(ctx, ctx.requests.workers.get(index, ())):
            continue
        there = held[index] if index < len(held) else None
        if not isinstance(there, LeanLayer):
            free[index] = None
        elif there.slots.real is None:
            slots = there.slots.grown(None, there.length, 1)
            free[index] = Lean(there, Coming(slots, 1), ctx.stood(None, slots.places))
    return free


def _rest(ctx: ForwardContext, workers: Sequence[Request[Worker]]) -> bool:
    """Whether all tokens do all in a layer, by those who have a say in it."""
    for request in workers:
        if request.mark is None or request.mark in ctx.marks:
            rests = getattr(request.by, "rests", None)
            if rests is None or not rests(ctx):
                return False
    return True
