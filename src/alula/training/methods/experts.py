"""Method experts: updates of the decoder's matrices that act where an image is in play, and the projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from alula.grafts import ExpertsConfig
from alula.training.methods.grafted import GraftMethod


class Experts(GraftMethod):
    """Experts beside the decoder's linears, for image tokens or from the first image on; the decoder is frozen."""

    name: ClassVar[str] = "experts"
    settings: ClassVar[Any] = ExpertsConfig
    parts: ClassVar[Mapping[str, float | None]] = {"experts": 2e-4, "projector": 1e-4, "llm": None}
    defining: ClassVar[tuple[str, ...]] = ("experts",)
