"""Method universal: progressive alignment of media to a frozen language model, after OneLLM (arXiv 2312.03700).

A stage trains what the media it names have of their own (tokenizers, projections, modality tokens, routers, tags) and
the experts that all media share; encoder and language model are frozen. The first stage aligns images with one expert;
a later one may begin with more, copied from it. Instruction tuning is method `full` with the part `llm` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from alula.anatomy import Anatomy
from alula.errors import RecipeError
from alula.hosts import Host
from alula.hosts.universal import UniversalForConditionalGeneration, grow_experts
from alula.hosts.universal.projection import EXPERTS
from alula.hosts.universal.shapes import SHAPES
from alula.settings import Int
from alula.training.fields import WIDE, Section
from alula.training.methods.base import HostMethod, Tunable

_RATE = 5e-5  # of the published first stage; the later ones take a fifth


class UniversalSpec(Section):
    """Settings of a stage of alignment.

    Attributes:
        media: which media it aligns, earlier ones among them; their data stand in the stage's sources.
        experts: how many experts it begins with; None: as many as the host has.
        start: what more experts begin as: copies of the first, or random weights.
        router: how they are weighed; None: as the host was built to.
    """

    media: tuple[str, ...] = Field(default=("image",), min_length=1)
    experts: Int | None = Field(default=None, ge=2, le=WIDE)
    start: Literal["copied", "random"] = "copied"
    router: Literal["soft_sigmoid", "softmax", "constant", "sparse"] | None = None

    @model_validator(mode="after")
    def _with_effect(self) -> UniversalSpec:
        if self.experts is None and self.model_fields_set & {"start", "router"}:
            raise ValueError(
                "start and router are of experts that a stage begins with; name how many, or leave them out"
            )
        return self

    @field_validator("media")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in SHAPES:
                raise ValueError(f"a universal encoder reads no {name!r}, only {', '.join(SHAPES)}")
        if len({*value}) < len(value):
            raise ValueError("a medium is named twice")
        return value


class Universal(HostMethod):
    """The connectors of some media and the experts they share; the encoder where it is named."""

    name: ClassVar[str] = "universal"
    settings: ClassVar[Any] = UniversalSpec
    parts: ClassVar[Mapping[str, float | None]] = {
        "projector": None,
        f"connector.{EXPERTS}": None,
        **{f"connector.{medium}": None for medium in SHAPES},
        "tower": None,
    }
    defining: ClassVar[tuple[str, ...]] = ("projector", "connector.")

    def rates(self, settings: UniversalSpec) -> dict[str, float]:
        return dict.fromkeys(_trained(settings.media), _RATE)

    def expand(self, train: Mapping[str, Any], settings: Any) -> Mapping[str, Any]:
        """``projector`` is the experts and the connectors of the stage's media."""
        given = settings if isinstance(settings, Mapping) else {}
        media = given.get("media", UniversalSpec.model_fields["media"].default)
        if not isinstance(media, list | tuple) or "projector" not in train or not isinstance(settings, Mapping):
            return train
        rest = {part: rate for part, rate in train.items() if part != "projector"}
        return {**dict.fromkeys(_trained(media), train["projector"]), **rest}

    def check(self, anatomy: Anatomy, settings: UniversalSpec) -> None:
        if anatomy.tower is None:  # an LLM is yet to be joined with one
            return
        self._check(anatomy.host, settings)

    def put_on(
        self, host: Host, settings: Any, *, base: str, previous: Path | None, train_projector: bool, seed: int
    ) -> Tunable:
        self._check(host.model, settings)
        if settings.experts is not None:
            grow_experts(host.model, settings.experts, start=settings.start, router=settings.router, seed=seed)
        return super().put_on(host, settings, base=base, previous=previous, train_projector=train_projector, seed=seed)

    @staticmethod
    def _check(model: Any, settings: UniversalSpec) -> None:
        if not isinstance(model, UniversalForConditionalGeneration):
            raise RecipeError(
                f"{type(model).__name__} has no universal encoder",
                where="method",
                remedy="take a host built with `encoder: universal`",
            )
        for medium in settings.media:
            if medium not in model.config.media:
                raise RecipeError(
                    f"the host takes {', '.join(model.config.media)}, not {medium}",
                    where="universal.media",
                    remedy="name it in the modalities that the host is built with, or leave it out",
                )


def _trained(media: Any) -> list[str]:
    return [f"connector.{EXPERTS}", *(f"connector.{medium}" for medium in media)]
