"""More experts out of the one that images taught: what OneLLM begins its second stage with."""

from __future__ import annotations

from typing import Any

import torch

from alula.errors import UsageError
from alula.hosts.universal.modeling import UniversalForConditionalGeneration
from alula.hosts.universal.projection import UniversalConnectors
from alula.hosts.universal.shapes import ProjectionShape, plain

STARTS = ("copied", "random")
"""how the experts of a grown host begin: as copies of its first, or from random weights"""


@torch.no_grad()
def grow_experts(model: Any, experts: int, *, start: str = "copied", router: str | None = None, seed: int = 0) -> None:
    """Give a universal host more experts, in place, and a fresh router for every medium.

    Args:
        model: `UniversalForConditionalGeneration` with one expert.
        experts: how many it has afterwards.
        start: ``copied``: all are the expert it had, as published, so that the host computes what it did whatever the
            routers weigh (but with a sparse one, which does not weigh to one); ``random``: none of them.
        router: how experts are weighed, one of `alula.hosts.universal.shapes.ROUTERS`; None: as the host was built to.
        seed: of routers and of random experts.

    Raises:
        UsageError: a host of another kind, one with several experts already, or no such start.
    """
    if not isinstance(model, UniversalForConditionalGeneration):
        raise UsageError(
            f"{type(model).__name__} has no experts to grow", remedy='build the host with encoder="universal"'
        )
    if start not in STARTS:
        raise UsageError(f"no start is called {start!r}", where="start", remedy=f"one of: {', '.join(STARTS)}")
    config: Any = model.config
    before = config.projection_shape
    if before.experts != 1:
        raise UsageError(
            f"the host has {before.experts} experts already",
            where="experts",
            remedy="build it with connector_options={'experts': 1}",
        )
    if experts < 2:
        raise UsageError(f"{experts} experts are no more than there are", where="experts")
    old: Any = model.model.multi_modal_projector
    shape = ProjectionShape(**{**plain(before), "experts": experts, "router": router or before.router})
    grown = UniversalConnectors(
        shape,
        {medium: config.shape(medium) for medium in config.media},
        config.vision_config.hidden_size,
        config.text_config.hidden_size,
        first=old.first,
    ).float()
    grown.initialise(seed)
    grown.to(device=model.device, dtype=model.dtype)
    if start == "copied":
        for expert in grown.experts:
            expert.load_state_dict(old.experts[0].state_dict())
    for medium in config.media:
        grown.of(medium).load_state_dict(old.of(medium).state_dict(), strict=False)  # all but the new routers
    grown.train(old.training)
    model.model.multi_modal_projector = grown
    config.projection = plain(shape)
