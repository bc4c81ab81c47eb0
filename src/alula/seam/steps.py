"""What a step of generation asks of decoder layers that tokens were taken out of: next to nothing.

Where nobody takes out the one new token, a layer runs as the host's own, beside as many keys as its cache layer holds.
That is found out once, for all layers of a forward: between two layers their weights push all else out of a processor's
caches, so what little is asked there costs several times what it does in a loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from alula.seam.context import ForwardContext
from alula.seam.lanes import Coming, LeanLayer
from alula.seam.requests import Worker


class Lean(NamedTuple):
    """A layer of a cache that holds the keys of some tokens, and what it is to be told before the step is in it."""

    layer: LeanLayer
    coming: Coming


@torch.compiler.disable  # bookkeeping on the host: nothing in it to fuse
def free_layers(ctx: ForwardContext) -> Mapping[int, Lean | None]:
    """The decoder layers that the token of a step goes through as it does without anybody who takes tokens out, unless
    the host masks keys; None: the layer holds all of these. Empty where a forward is no step.

    It is told to the forward which keys stand in them.
    """
    if not ctx.is_step:
        return {}
    held = getattr(ctx.layer_cache, "layers", None) or []
    free: dict[int, Lean | None] = {}
    resting: dict[int, bool] = {}  # one worker has a say in many layers, most often, which hold the same
    slots, coming = None, None
    for index, workers in ctx.requests.workers.items():
        is_free = True
        for request in workers:
            if request.mark is None or request.mark in ctx.marks:
                key = id(request.by)
                if key not in resting:
                    resting[key] = _rests(request.by, ctx)
                is_free = is_free and resting[key]
        there = held[index] if index < len(held) else None
        if not is_free:
            continue
        if not isinstance(there, LeanLayer):
            free[index] = None
        elif there.slots.real is None:
            if coming is None or there.slots is not slots:
                slots = there.slots
                coming = Coming(slots.grown(None, there.length, 1), 1)
            free[index] = Lean(there, coming)
            ctx.beside[index] = coming.slots
    return free


def _rests(worker: Worker, ctx: ForwardContext) -> bool:
    rests = getattr(worker, "rests", None)
    return rests is not None and rests(ctx)
