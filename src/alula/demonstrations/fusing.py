"""A host that is trained to read demonstrations through a map: both passes in one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alula.demonstrations.encoding import fuse
from alula.demonstrations.interleaved import DEMONSTRATIONS, FUSED_FROM, FUSED_TO
from alula.grafts.aim import FUSED, FUSED_AT, AimGraft


class Fusing(nn.Module):
    """A host whose forward takes batches of `InterleavedCollator`: demonstrations are read first, without gradients
    (the host is frozen, and the map stands behind it), fused, and spliced into the prompts.

    Anything else that is asked of it is asked of the host.

    Args:
        host: with the graft on it.
        aim: the graft, whose map is trained.
    """

    def __init__(self, host: nn.Module, aim: AimGraft) -> None:
        super().__init__()
        self.host = host
        self._aim = aim

    def get_base_model(self) -> nn.Module:
        """The host."""
        return self.host

    def forward(self, **batch: Any) -> Any:
        """The host's output for the prompts."""
        demonstrations = batch.pop(DEMONSTRATIONS, None)
        if demonstrations is None:
            return self.host(**batch)
        places, to = batch.pop(FUSED_FROM), batch.pop(FUSED_TO)
        count, length = batch["input_ids"].shape
        fused = fuse(self._aim, demonstrations, places)
        rows = fused.new_zeros(count * length, fused.shape[-1]).index_copy(0, to, fused)
        at = torch.zeros(count * length, dtype=torch.bool, device=to.device).index_fill(0, to, True)
        further = {FUSED: rows.view(count, length, -1), FUSED_AT: at.view(count, length)}
        return self.host(**batch, **further)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("host"), name)
