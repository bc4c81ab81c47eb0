"""What the study of visual knowledge leaves behind: an answer per question; every figure is worked out from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from alula.errors import EvaluationError
from alula.stats import CHANGE, SHARE
from alula_fledgling.microworld.named import SIGHT_FAMILIES
from studies.records import StudyRecord
from studies.signs import SignTest, sign_test
from studies.visual_knowledge.arms import ARMS, BEFORE, CLOSE, Arm

Kind = Literal["held", "tutored"]
Measure = Literal["right", "nats"]
SEEN = "seen"
"""all of `SIGHT_FAMILIES` together, each as much as the others"""
CHANCES = {"comparison": 1 / 2}
CHANCE = 1 / 6


class KnowledgeRecord(StudyRecord):
    """The study's outcome.

    Attributes:
        seeds: training seed -> arm, or `BEFORE` -> what `studies.visual_knowledge.measure` found.
    """

    seeds: dict[int, dict[str, dict[str, Any]]]

    @property
    def arms(self) -> list[Arm]:
        """Those that were trained with every seed."""
        return [arm for arm in ARMS if all(arm.name in seed for seed in self.seeds.values())]

    @property
    def things(self) -> int:
        """Held things of all worlds."""
        return len(self.units(BEFORE, "colour"))

    def units(self, arm: str, family: str, kind: Kind = "held", measure: Measure = "right") -> list[float]:
        """A number for each thing of each seed's world: the mean over the questions about it."""
        families = SIGHT_FAMILIES if family == SEEN else (family,)
        found: list[float] = []
        for seed in sorted(self.seeds):
            answers = self.seeds[seed][arm]["answers"][kind]
            per_family = [_by_thing(answers[each]["about"], answers[each][measure]) for each in families]
            found += [float(np.mean([each[thing] for each in per_family])) for thing in per_family[0]]
        return found

    def accuracy(self, arm: str, family: str, kind: Kind = "held") -> SignTest:
        """Share right; the interval resamples things."""
        return sign_test(self.units(arm, family, kind), within=SHARE)

    def gain(self, arm: str, other: str, family: str, measure: Measure = "right") -> SignTest:
        """What an arm answers better than another, thing by thing."""
        pairs = zip(self.units(arm, family, measure=measure), self.units(other, family, measure=measure), strict=True)
        return sign_test([one - another for one, another in pairs], within=CHANGE)

    def text(self, arm: str) -> SignTest:
        """Share right of the old text skills; the interval resamples questions."""
        return sign_test(self._text(arm), within=SHARE)

    def text_gain(self, arm: str, other: str) -> SignTest:
        """What an arm answers better of them, question by question; a question is one over all seeds."""
        pairs = zip(self._text(arm), self._text(other), strict=True)
        return sign_test([one - another for one, another in pairs], within=CHANGE)

    def named(self, arm: str, mode: str = "use") -> SignTest | None:
        """Share of pictures whose thing is called by its name; None: it was not asked in that mode."""
        return self._pictures(arm, mode, lambda found: found["named"])

    def found(self, arm: str, mode: str = "use") -> SignTest | None:
        """How often a caption finds its picture among those of all things; None where there is nothing to compare."""
        return self._pictures(arm, mode, lambda found: None if found["found"] is None else [found["found"][0]])

    def weight(self, arm: str) -> float | None:
        """What the router gives the memory, mean over seeds; None: there is none."""
        found = [seed[arm]["weight"] for seed in self.seeds.values()]
        return None if None in found else float(np.mean(found))

    def trained(self, arm: str) -> int:
        """Weights that an arm trains of what answers; the maps in which captions find pictures answer nothing."""
        (seed, *_) = sorted(self.seeds)
        parts = self.seeds[seed][arm]["trained"]
        return sum(count for part, count in parts.items() if part != "mks2.retrieval")

    def check(self) -> None:
        """Hold adapters to as many trained weights.

        Raises:
            EvaluationError: two of them differ by more than `CLOSE`.
        """
        sizes = {arm.name: self.trained(arm.name) for arm in self.arms if arm.is_adapter}
        if sizes and max(sizes.values()) > (1 + CLOSE) * min(sizes.values()):
            raise EvaluationError(f"the adapters train different numbers of weights: {sizes}", where="visual-knowledge")

    def _text(self, arm: str) -> list[float]:
        return [float(each) for each in np.mean([seed[arm]["text"] for seed in self.seeds.values()], axis=0)]

    def _pictures(self, arm: str, mode: str, read: Callable[[Any], Sequence[float] | None]) -> SignTest | None:
        parts = [read(seed[arm]["pictures"][mode]) for seed in self.seeds.values() if mode in seed[arm]["pictures"]]
        values = [value for part in parts if part is not None for value in part]
        return sign_test(values, within=SHARE) if values else None


def _by_thing(about: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """The mean per thing, in alphabetical order."""
    return {
        thing: float(np.mean([value for name, value in zip(about, values, strict=True) if name == thing]))
        for thing in sorted(set(about))
    }
