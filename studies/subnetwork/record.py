"""What the study of subnetworks leaves behind: a yes or no per question, packed; every figure is worked out from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from alula.evaluation.results import Record
from alula.stats import Estimate, seed_interval
from studies.policies.record import Marks, marks, mean
from studies.records import StudyRecord


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


class KindAnswers(Record):
    """As `Answers`, of four kinds of questions, by their names."""

    sparsity: float = 0.0
    image: str
    video: str
    audio: str
    text: str


class KindPair(Record):
    """How much masks of the tokens of two kinds share, mean over layers: as they are applied, and what the probe says
    of the unpruned model (`alula.probes.MatrixOverlap`)."""

    applied: float
    iou: float
    shared_magnitude: float
    chance: float
    ceiling: float
    beyond_magnitude: float


class KindsRecord(Record):
    """One model of four kinds.

    Attributes:
        guessed: by kind, the share right of who gives each family's commonest answer always.
        pairs: by two kinds, "image, video".
        others, magnitude: by kind, what the mask of its tokens shares with that of other samples, and with magnitude.
        own: by kind, answers under the mask of its prompts.
        shared: by rule and sparsity of each kind's mask, "pooled-50".
    """

    none: KindAnswers
    guessed: dict[str, float]
    pairs: dict[str, KindPair]
    others: dict[str, float]
    magnitude: dict[str, float]
    own: dict[str, KindAnswers]
    shared: dict[str, KindAnswers]


class SeedRecord(Record):
    """The trained models of one seed; of parts that were not run nothing is there."""

    none: Answers | None = None
    overlap: Shared | None = None
    pruned: dict[str, Answers] = Field(default_factory=dict)
    """by what the mask is found by and sparsity, "both-50\""""
    shared: dict[str, Answers] = Field(default_factory=dict)
    beside: dict[str, Answers] = Field(default_factory=dict)
    """by what was healed on: the adapter beside the pruned model"""
    merged: dict[str, Answers] = Field(default_factory=dict)
    """merged, and the mask put on again"""
    trained: dict[str, Answers] = Field(default_factory=dict)
    """by what was trained on: the adapter beside the model as it is"""
    kinds: KindsRecord | None = None


class SubnetworkRecord(StudyRecord):
    """A whole study, by training seed."""

    format: Literal["alula-subnetwork-1"] = "alula-subnetwork-1"
    seeds: dict[int, SeedRecord]

    def has(self, part: str) -> bool:
        """Whether a part of the study was run."""
        return part in self.settings.get("parts", ("masks", "healing"))

    @property
    def sparsities(self) -> list[float]:
        """That were pruned to, the least first."""
        found: list[float] = sorted(self.settings["sparsities"])
        return found

    def right(self, group: str, name: str, skill: str) -> Marks:
        """(seeds, questions) answered right: of a group of `SeedRecord` (with "kinds." before it, of `KindsRecord`),
        "none" for the models as they are."""
        *inside, own = group.split(".")
        found = [getattr(model, inside[0]) if inside else model for model in self.seeds.values()]
        answers = [model.none if own == "none" else getattr(model, own)[name] for model in found]
        return marks([getattr(each, skill) for each in answers])

    def whole(self, group: str, skill: str) -> Marks:
        """(seeds, questions) the models as they are answer right: those that a group is made of."""
        return self.right("kinds.none" if group.startswith("kinds.") else "none", "", skill)

    def lost(self, group: str, name: str, skill: str) -> Estimate:
        """Right answers less those of the models as they are."""
        return mean(self.right(group, name, skill) - self.whole(group, skill))

    def kept(self, group: str, name: str, skill: str) -> float:
        """Right answers over those of the models as they are."""
        whole = self.whole(group, skill).mean()
        return float(self.right(group, name, skill).mean() / whole) if whole else float("nan")

    def first(self, group: str, name: str, one: str = "visual", other: str = "text") -> Estimate | None:
        """What is kept of one skill less what is kept of the other, with an interval over trainings and questions; None
        where a model as it is answers none."""
        shares, variance = [], 0.0
        for skill, sign in ((one, 1), (other, -1)):
            before, after = self.whole(group, skill), self.right(group, name, skill)
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

    def sparsity(self, group: str, name: str) -> Estimate:
        """Share of the decoder's matrices that is zero."""
        *inside, own = group.split(".")
        found = {seed: getattr(model, inside[0]) if inside else model for seed, model in self.seeds.items()}
        return self.over_seeds({seed: getattr(model, own)[name].sparsity for seed, model in found.items()})

    @property
    def trained(self) -> list[str]:
        """What models that were not pruned were trained on."""
        return [*next(iter(self.seeds.values())).trained]

    @property
    def overlaps(self) -> dict[int, Shared]:
        """By seed."""
        return {seed: model.overlap for seed, model in self.seeds.items() if model.overlap is not None}

    @property
    def kinds(self) -> dict[int, KindsRecord]:
        """By seed."""
        return {seed: model.kinds for seed, model in self.seeds.items() if model.kinds is not None}

    def pair(self, name: str) -> Estimate:
        """What two masks share."""
        return self.over_seeds({seed: overlap.pairs[name] for seed, overlap in self.overlaps.items()})

    def layers(self, name: str) -> list[float]:
        """A value per layer, mean over models."""
        return np.mean([overlap.layers[name] for overlap in self.overlaps.values()], axis=0).tolist()

    def of_kinds(self, pair: str, figure: str) -> Estimate:
        """A figure of `KindPair` of two kinds."""
        return self.over_seeds({seed: getattr(kinds.pairs[pair], figure) for seed, kinds in self.kinds.items()})


def gather_seed(found: Mapping[str, Any]) -> SeedRecord:
    """One seed's record, of its measurements by name."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        group, _, own = name.rpartition("/")
        groups.setdefault(group, {})[own] = value
    alone, kinds, healed = groups.get("", {}), groups.get("kinds", {}), groups.get("healed", {})
    overlap = alone.get("overlap")
    return SeedRecord(
        none=Answers(**alone["none"]) if "none" in alone else None,
        overlap=None
        if overlap is None
        else Shared(
            layers=overlap["layers"],
            pairs=overlap["pairs"],
            chance=overlap["chance"],
            changed_by_padding=overlap["changed by padding"],
        ),
        **{
            group: {name: Answers(**value) for name, value in groups.get(group, {}).items()}
            for group in ("pruned", "shared", "trained")
        },
        beside={name: Answers(sparsity=value["sparsity"], **value["beside"]) for name, value in healed.items()},
        merged={name: Answers(sparsity=value["sparsity"], **value["merged"]) for name, value in healed.items()},
        kinds=None
        if not kinds
        else KindsRecord(
            none=KindAnswers(**kinds["none"]["answers"]),
            guessed=kinds["none"]["guessed"],
            **kinds["overlap"],
            own={name: KindAnswers(**value) for name, value in groups["kinds/own"].items()},
            shared={name: KindAnswers(**value) for name, value in groups["kinds/shared"].items()},
        ),
    )
