"""Method projector: only what maps tower features to the decoder's width is trained (LLaVA's first stage)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from alula.media import MEDIA
from alula.training.methods.base import HostMethod


class Projector(HostMethod):
    """All connectors, or those of one medium. The rate is that of LLaVA-1.5, for 7B decoders."""

    name: ClassVar[str] = "projector"
    parts: ClassVar[Mapping[str, float | None]] = {
        "projector": 1e-3,
        **{f"connector.{medium}": None for medium in MEDIA},
        "connector.shared": None,
    }
    defining: ClassVar[tuple[str, ...]] = ("projector", "connector.")
    needs_layers: ClassVar[bool] = False
    packs: ClassVar[bool] = True
