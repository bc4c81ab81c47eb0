"""A way to tune of forty lines, as a package of its own would bring it: full, with logits at images kept small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from alula.seam import ForwardContext
from alula.settings import Number
from alula.training.fields import Section
from alula.training.losses import Loss
from alula.training.methods.base import HostMethod, Tunable


class CalmSettings(Section):
    """Settings of the toy."""

    note: str = ""
    weight: Number = Field(default=0.5, ge=0)


def calm(outputs: Any, batch: Mapping[str, Any], context: ForwardContext) -> Tensor:
    """Mean square of the logits at a sample's image tokens, summed over samples; 0 for a sample without any."""
    seen = context.tokens.is_perceptual & batch["attention_mask"].bool()  # (B, S)
    squares = outputs["logits"].float().square().mean(dim=-1) * seen
    return (squares.sum(dim=1) / seen.sum(dim=1).clamp(min=1)).sum()


class Calm(HostMethod):
    """The decoder under another name, with a loss of its own: a toy."""

    name: ClassVar[str] = "toy"
    settings: ClassVar[Any] = CalmSettings
    parts: ClassVar[Mapping[str, float | None]] = {"llm": 1e-3, "projector": None}
    defining: ClassVar[tuple[str, ...]] = ("llm",)

    def losses(self, tuned: Tunable, settings: CalmSettings) -> Mapping[str, Loss]:
        return {"calm": Loss(calm, settings.weight)}


METHOD = Calm()
