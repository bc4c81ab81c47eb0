"""Method mks2: a visual memory, stored from captions in one stage and mixed with the MLP in the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from alula.anatomy import Anatomy
from alula.errors import HostError, RecipeError, UsageError
from alula.grafts.mks2 import MKS2Config, MKS2Graft
from alula.grafts.mks2.config import Mode
from alula.grafts.mks2.graft import adapted_linears
from alula.hosts import Host
from alula.seam import ForwardContext
from alula.settings import Bool, Int, Number
from alula.training.contrast import info_nce
from alula.training.fields import MANY
from alula.training.losses import Loss
from alula.training.methods.base import Tunable
from alula.training.methods.grafted import GraftMethod

_OF_MODE: dict[Mode, tuple[str, ...]] = {
    "text": (),
    "store": ("mks2.memory", "mks2.retrieval"),
    "mix": ("mks2.memory", "mks2.lora", "mks2.router"),
}


class MKS2Spec(MKS2Config):
    """Settings of the graft, and what stage 1 learns from. A stage in mode "mix" is stage 2.

    Attributes:
        caption_weight: factor on the next-token loss.
        contrast_weight: in mode "store", factor on the contrast of captions with images, 0: none; see `info_nce`.
        bidirectional: contrast images with captions as well.
    """

    mode: Mode = "store"
    retrieval: Int | None = Field(default=256, ge=1, le=2**16)
    caption_weight: Number = Field(default=1.0, ge=0, le=MANY)
    contrast_weight: Number = Field(default=1.0, ge=0, le=MANY)
    bidirectional: Bool = False

    @model_validator(mode="after")
    def _learns(self) -> MKS2Spec:
        if self.mode == "text":
            raise ValueError('mode="text" is the host, in which nothing is learnt')
        if self.retrieval is None and {"contrast_weight", "bidirectional"} & self.model_fields_set:
            raise ValueError("contrast_weight and bidirectional are of a contrast, and retrieval is null")
        if self.caption_weight == 0 and not self.contrasts:
            raise ValueError("caption_weight is 0 and there is no contrast: nothing is learnt")
        return self

    @property
    def contrasts(self) -> bool:
        """Whether captions are compared with images."""
        return self.mode == "store" and self.retrieval is not None and self.contrast_weight > 0

    def of_graft(self) -> MKS2Config:
        """The graft's own settings."""
        return MKS2Config(**{name: getattr(self, name) for name in MKS2Config.model_fields})


class MKS2(GraftMethod):
    """Stage 1 (mode "store") trains memory, projector and the maps of captions and images; stage 2 (mode "mix")
    adapters and router. The rates are a choice: the paper has none."""

    name: ClassVar[str] = "mks2"
    settings: ClassVar[Any] = MKS2Spec
    parts: ClassVar[Mapping[str, float | None]] = {
        "mks2.memory": 1e-4,
        "mks2.retrieval": 1e-4,
        "mks2.lora": 1e-4,
        "mks2.router": 1e-4,
        "projector": 1e-4,
    }
    defining: ClassVar[tuple[str, ...]] = ("mks2.",)
    continued: ClassVar[tuple[str, ...]] = (*MKS2Config.free, "caption_weight", "contrast_weight", "bidirectional")

    def rates(self, settings: MKS2Spec) -> dict[str, float]:
        if settings.mode == "store":
            chosen = ["mks2.memory", *(["mks2.retrieval"] if settings.contrasts else []), "projector"]
        else:
            chosen = ["mks2.lora", *(["mks2.router"] if settings.route == "softmax" else [])]
        return {part: rate for part, rate in super().rates(settings).items() if part in chosen}

    def expand(self, train: Mapping[str, Any], settings: Any) -> Mapping[str, Any]:
        """`train: {mks2: 1e-3}` is short for the parts of the graft that the mode trains."""
        if self.name not in train:
            return train
        given = settings if isinstance(settings, Mapping) else settings.model_dump() if settings is not None else {}
        rest = {part: rate for part, rate in train.items() if part != self.name}
        try:
            parts = self.rates(MKS2Spec.model_validate(dict(given)))
        except ValueError:  # refused where it stands
            parts = self.rates(MKS2Spec())
        return {**{part: train[self.name] for part in parts if part.startswith("mks2.")}, **rest}

    def idle_parts(self, settings: MKS2Spec) -> Collection[str]:
        acting = {*_OF_MODE[settings.mode]}
        if not settings.contrasts:
            acting.discard("mks2.retrieval")
        if settings.route == "modality":
            acting.discard("mks2.router")
        return {part for part in self.parts if part.startswith("mks2.")} - acting

    def misplaced(self, settings: MKS2Spec, rates: Collection[str], before: MKS2Spec | None) -> str | None:
        if before is not None and before.mode == "mix" and settings.mode == "store":
            return "stores into a memory that was mixed already: put mode `store` before mode `mix`"
        if before is None and settings.mode == "mix" and "mks2.memory" not in rates:
            return "mixes a memory that holds nothing: put a stage of mode `store` before it, or train `mks2.memory`"
        return None

    def no_retention(self, settings: MKS2Spec) -> str | None:
        if settings.mode == "store" and settings.store == "instead":
            return "has no MLP while it stores; store: beside keeps it, and `alula eval` measures what mode `mix` keeps"
        return None

    def check(self, anatomy: Anatomy, settings: MKS2Spec) -> None:
        super().check(anatomy, settings)
        try:
            for index in anatomy.layer_indices(settings.layers):
                adapted_linears(anatomy, index, settings)
            if settings.retrieval is not None and anatomy.tower is not None:  # an LLM is yet to be joined with one
                anatomy.image_connector  # noqa: B018 - refuses where there is none
        except (HostError, UsageError) as error:
            raise RecipeError(error.message, where=error.where or "mks2", remedy=error.remedy) from None

    def put_on(
        self, host: Host, settings: MKS2Spec, *, base: str, previous: Path | None, train_projector: bool, seed: int
    ) -> Tunable:
        given = settings.of_graft() if previous is None else settings
        return super().put_on(host, given, base=base, previous=previous, train_projector=train_projector, seed=seed)

    def describes(self, settings: MKS2Spec) -> bool:
        return settings.contrasts

    def token_weight(self, settings: MKS2Spec) -> float:
        return settings.caption_weight

    def losses(self, tuned: Tunable, settings: MKS2Spec) -> Mapping[str, Loss]:
        if not settings.contrasts:
            return {}
        assert isinstance(tuned.graft, MKS2Graft)
        function = partial(_contrast, tuned.graft, settings.bidirectional)
        return {"contrast": Loss(function, settings.contrast_weight, in_batch=True)}


def _contrast(
    graft: MKS2Graft, bidirectional: bool, outputs: Any, batch: Mapping[str, Any], context: ForwardContext
) -> Tensor:
    pairs = graft.pairs(context)
    assert pairs is not None, "the batch does not say what describes what"
    return info_nce(pairs, bidirectional=bidirectional)
