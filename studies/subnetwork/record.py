"""What the study of subnetworks leaves behind: a yes or no per question, packed; every figure is worked out from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from alula.evaluation.results import Record
from alula.stats import Estimate, seed_interval
from studies.policies.record import Marks, marks, mean


class Answers(Record):
    """Which questions are answered right, packed; of what share of the decoder's matrices that is zero."""

    sparsity: float = 0.0
    text: str
    visual: str


class Shared(Record):
    """How much masks share: intersection over union, mean over matrices.

    Attributes:
        layers: by name, a value per layer: of image and text tokens in one prompt (`alula.probes.MatrixOverlap`).
        pairs: of masks as they are applied.
        chance: of independent masks.
        changed_by_padding: share of weights that only one of the masks with and without the defect keeps.
    """

    layers: dict[str, list[float]]
    pairs: dict[str, float]
    chance: float
    changed_by_padding: float


class SeedRecord(Record):
    """One trained model."""

    none: Answers
    overlap: Shared
    pruned: dict[str, Answers]
    """by what the mask is found by and sparsity, "both-50\""""
    shared: dict[str, Answers]
    beside: dict[str, Answers]
    """by what was healed on: the adapter beside the pruned model"""
    merged: dict[str, Answers]
    """merged, and the mask put on again"""


class SubnetworkRecord(Record):
    """A whole study, by training seed."""

    format: Literal["alula-subnetwork-1"] = "alula-subnetwork-1"
    command: str
    created: str
    environment: dict[str, str]
    seconds: float
    settings: dict[str, Any]
    seeds: dict[int, SeedRecord]

    @property
    def sparsities(self) -> list[float]:
        """That were pruned to, the least first."""
        found: list[float] = sorted(self.settings["sparsities"])
        return found

    def right(self, group: str, name: str, skill: str) -> Marks:
        """(seeds, questions) answered right: of a group of `SeedRecord`, "none" for the models as they are."""
        models = [*self.seeds.values()]
        found = [model.none if group == "none" else getattr(model, group)[name] for model in models]
        return marks([getattr(answers, skill) for answers in found])

    def lost(self, group: str, name: str, skill: str) -> Estimate:
        """Right answers less those of the models as they are."""
        return mean(self.right(group, name, skill) - self.right("none", "", skill))

    def kept(self, group: str, name: str, skill: str) -> float:
        """Right answers over those of the models as they are."""
        whole = self.right("none", "", skill).mean()
        return float(self.right(group, name, skill).mean() / whole) if whole else float("nan")

    def first(self, group: str, name: str) -> Estimate | None:
        """What is kept of sight less what is kept of text, with an interval over trainings and questions; None where a
        model as it is answers none."""
        shares, variance = [], 0.0
        for skill, sign in (("visual", 1), ("text", -1)):
            before, after = self.right("none", "", skill), self.right(group, name, skill)
            if not before.mean(axis=1).all():
                return None
            shares.append(sign * after.mean(axis=1) / before.mean(axis=1))
            # of a ratio of means, by its first order, over questions
            rest = (after - before * (after.mean() / before.mean())).mean(axis=0)
            if len(rest) > 1:
                variance += float(rest.var(ddof=1)) / len(rest) / float(before.mean()) ** 2
        return seed_interval(sum(shares).tolist(), float(np.sqrt(variance)), len(rest))

    def against(self, one: tuple[str, str], other: tuple[str, str], skill: str) -> Estimate:
        """Right answers of one mask less those of another, question by question."""
        return mean(self.right(*one, skill) - self.right(*other, skill))

    def over_seeds(self, values: Mapping[int, float]) -> Estimate:
        """A figure of each model, with an interval over trainings alone."""
        return seed_interval(list(values.values()), 0.0, len(values))

    def pair(self, name: str) -> Estimate:
        """What two masks share."""
        return self.over_seeds({seed: model.overlap.pairs[name] for seed, model in self.seeds.items()})

    def layers(self, name: str) -> list[float]:
        """A value per layer, mean over models."""
        return np.mean([model.overlap.layers[name] for model in self.seeds.values()], axis=0).tolist()


def gather_seed(found: Mapping[str, Any]) -> SeedRecord:
    """One seed's record, of its measurements by name."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        group, _, own = name.partition("/")
        groups.setdefault(group, {})[own] = value
    overlap = groups["overlap"][""]
    healed = groups["healed"]
    return SeedRecord(
        none=Answers(**groups["none"][""]),
        overlap=Shared(
            layers=overlap["layers"],
            pairs=overlap["pairs"],
            chance=overlap["chance"],
            changed_by_padding=overlap["changed by padding"],
        ),
        pruned={name: Answers(**value) for name, value in groups["pruned"].items()},
        shared={name: Answers(**value) for name, value in groups["shared"].items()},
        beside={name: Answers(sparsity=value["sparsity"], **value["beside"]) for name, value in healed.items()},
        merged={name: Answers(sparsity=value["sparsity"], **value["merged"]) for name, value in healed.items()},
    )
