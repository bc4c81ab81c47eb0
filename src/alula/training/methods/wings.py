"""Method wings: a Wings graft, and the projector; the decoder where it is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from alula.grafts import WingsConfig
from alula.grafts.wings.config import LEARNERS
from alula.training.methods.grafted import GraftMethod


class Wings(GraftMethod):
    """Learners beside attention, and what routes them. The rates are the paper's, for 7B decoders."""

    name: ClassVar[str] = "wings"
    settings: ClassVar[Any] = WingsConfig
    parts: ClassVar[Mapping[str, float | None]] = {
        "wings.visual": 1e-3,
        "wings.textual": 1e-3,
        "wings.router": 1e-3,
        "projector": 1e-3,
        "llm": None,
    }
    defining: ClassVar[tuple[str, ...]] = ("wings.",)

    def rates(self, settings: WingsConfig) -> dict[str, float]:
        there = {*_graft_parts(settings.learners), "projector"}
        return {part: rate for part, rate in super().rates(settings).items() if part in there}

    def expand(self, train: Mapping[str, Any], settings: Any) -> Mapping[str, Any]:
        """`train: {wings: 1e-3}` is short for all parts of the graft at that rate."""
        if self.name not in train:
            return train
        rest = {part: rate for part, rate in train.items() if part != self.name}
        learners = settings.get("learners") if isinstance(settings, Mapping) else getattr(settings, "learners", None)
        if not isinstance(learners, list | tuple):  # none named, or refused where it stands
            learners = LEARNERS
        return {**dict.fromkeys(_graft_parts(learners), train[self.name]), **rest}


def _graft_parts(learners: Any) -> list[str]:
    """The parts of a graft with these learners: a router chooses between two, so one alone has none."""
    names = [str(name) for name in learners]
    return [*(f"wings.{name}" for name in names), *(["wings.router"] if len(names) > 1 else [])]
