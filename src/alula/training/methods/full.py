"""Method full: every weight of the decoder is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from alula.training.methods.base import HostMethod


class Full(HostMethod):
    """Decoder and projector, and the tower where it is named. The rates are those of LLaVA-1.5, for 7B decoders."""

    name: ClassVar[str] = "full"
    parts: ClassVar[Mapping[str, float | None]] = {"llm": 2e-5, "projector": 2e-5, "tower": None}
    defining: ClassVar[tuple[str, ...]] = ("llm",)
    needs_layers: ClassVar[bool] = False
    packs: ClassVar[bool] = True
