"""Method browse: the condition's map and the projector, and the decoder where it is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from alula.anatomy import Anatomy
from alula.data.conditions import Conditions
from alula.data.dropping import WAYS
from alula.errors import HostError, RecipeError
from alula.grafts import BrowseConfig
from alula.hosts import Host
from alula.seam.connectors import conditioned_connector
from alula.settings import Number
from alula.training.browsing import Browsing
from alula.training.fields import PathText
from alula.training.methods.base import Tunable
from alula.training.methods.grafted import GraftMethod


def _known(ways: tuple[str, ...]) -> tuple[str, ...]:
    for way in ways:
        if way not in WAYS:
            raise ValueError(f"{way!r} is no way to leave out context: choose among {', '.join(WAYS)}")
    if len({*ways}) < len(ways):
        raise ValueError("one is listed twice")
    return ways


class BrowseSpec(BrowseConfig):
    """Settings of the graft, and what a stage learns from.

    Attributes:
        zero: share of the samples that are told nothing (a condition of zero): stage 1's anchor, 0.15 as published.
        drop: what the second pass does without, though the first has read it: "last": all images but the last;
            "blank": they are blank; "text": an earlier shot's text. Of several, one is drawn for every sample.
        conditions: a file that `alula browse` wrote (explicit); None: the model that is trained reads (implicit).
    """

    zero: Number = Field(default=0.0, ge=0, lt=1)
    drop: Annotated[tuple[str, ...], AfterValidator(_known)] = ()
    conditions: PathText | None = None

    @model_validator(mode="after")
    def _effective(self) -> BrowseSpec:
        if "drop" in self.model_fields_set and not self.drop:
            raise ValueError("drop is empty: name ways, or leave it out")
        return self

    def of_graft(self) -> BrowseConfig:
        """The graft's own settings."""
        return BrowseConfig(**{name: getattr(self, name) for name in BrowseConfig.model_fields})


class Browse(GraftMethod):
    """Stage 1 learns captions that were told a condition, stage 2 answers without some of the context.

    Published rates are 1e-4 for the condition's map and 1e-5 for the Q-Former.
    """

    name: ClassVar[str] = "browse"
    settings: ClassVar[Any] = BrowseSpec
    parts: ClassVar[Mapping[str, float | None]] = {"browse.condition": 1e-4, "projector": 1e-5, "llm": None}
    defining: ClassVar[tuple[str, ...]] = ("browse.condition",)
    continued: ClassVar[tuple[str, ...]] = ("zero", "drop", "conditions")

    def check(self, anatomy: Anatomy, settings: BrowseSpec) -> None:
        try:
            if anatomy.tower is not None:  # an LLM is yet to be joined with one
                conditioned_connector(anatomy)
        except HostError as error:
            raise RecipeError(error.message, where="browse", remedy=error.remedy) from None
        if settings.conditions is not None:
            Conditions.load(settings.conditions, width=anatomy.hidden_size)

    def put_on(
        self, host: Host, settings: BrowseSpec, *, base: str, previous: Path | None, train_projector: bool, seed: int
    ) -> Tunable:
        given = settings.of_graft() if previous is None else settings
        return super().put_on(host, given, base=base, previous=previous, train_projector=train_projector, seed=seed)

    def beside(self, settings: BrowseSpec, prompts: Any, *, seed: int) -> Browsing:
        conditions = None if settings.conditions is None else Conditions.load(settings.conditions)
        return Browsing(prompts, ways=settings.drop, zero=settings.zero, conditions=conditions, seed=seed)
