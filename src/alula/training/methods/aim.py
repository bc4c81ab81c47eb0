"""Method aim: the map through which demonstrations are read, learnt from interleaved documents on a frozen host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from alula.anatomy import Anatomy
from alula.data import Collator
from alula.demonstrations.fusing import Fusing
from alula.demonstrations.interleaved import InterleavedCollator
from alula.errors import HostError, RecipeError, UsageError
from alula.grafts.aim import AimConfig, AimGraft
from alula.grafts.aim.graft import check_positions
from alula.hosts import Host
from alula.settings import Int
from alula.training.methods.base import Tunable
from alula.training.methods.grafted import GraftMethod

_MOST_SHOTS = 1024


class AimSpec(AimConfig):
    """Settings of the graft, and how many demonstrations it learns from at a time.

    Attributes:
        shots: fewest and most demonstrations before a question; each document is given a number between them.
    """

    shots: tuple[Int, Int] = Field(default=(1, 8))

    @model_validator(mode="after")
    def _some_shots(self) -> AimSpec:
        least, most = self.shots
        if not 1 <= least <= most <= _MOST_SHOTS:
            raise ValueError(f"shots are [fewest, most] of 1 to {_MOST_SHOTS}, not {list(self.shots)}")
        return self

    def of_graft(self) -> AimConfig:
        """The graft's own settings."""
        return AimConfig(**{name: getattr(self, name) for name in AimConfig.model_fields})


class Aim(GraftMethod):
    """The map alone; the host is frozen. The rate is that of the authors' SelfCP, for 7B decoders."""

    name: ClassVar[str] = "aim"
    settings: ClassVar[Any] = AimSpec
    parts: ClassVar[Mapping[str, float | None]] = {"aim": 5e-5}
    defining: ClassVar[tuple[str, ...]] = ("aim",)
    continued: ClassVar[tuple[str, ...]] = ("shots",)
    no_validation: ClassVar[str | None] = "is trained behind demonstrations, which held-out samples do not come with"

    def check(self, anatomy: Anatomy, settings: AimSpec) -> None:
        try:
            check_positions(anatomy)
            anatomy.layer_indices([settings.layer])
        except (HostError, UsageError) as error:
            raise RecipeError(error.message, where="aim.layer", remedy=error.remedy) from None

    def no_retention(self, settings: AimSpec) -> str | None:
        return "leaves the host as it is: without demonstrations nothing of its text skill can change"

    def collator(self, settings: AimSpec) -> Callable[..., Collator]:
        return partial(InterleavedCollator, shots=settings.shots)

    def put_on(
        self, host: Host, settings: AimSpec, *, base: str, previous: Path | None, train_projector: bool, seed: int
    ) -> Tunable:
        given = settings.of_graft() if previous is None else settings
        tuned = super().put_on(host, given, base=base, previous=previous, train_projector=train_projector, seed=seed)
        assert isinstance(tuned.graft, AimGraft)
        tuned.model = Fusing(tuned.model, tuned.graft)
        return tuned
