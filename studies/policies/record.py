"""What the policy study leaves behind: a yes or no per item, packed; every figure is worked out from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alula.evaluation.results import Record
from alula.stats import CHANGE, Estimate, Range, bounded, over_seeds, seed_interval, unseen
from studies.policies.measure import unpacked
from studies.records import StudyRecord

Marks = NDArray[np.float64]
"""(seeds, items): 1 for yes"""


class Answers(Record):
    """Answers to single questions under a policy, packed: whether right, and whether the ones without a policy."""

    right: str
    same: str


class Talks(Record):
    """Answers to the second of two questions about a picture, packed: asked alone, in one prompt, in a conversation."""

    alone: str
    prompt: str
    chat: str


class First(Record):
    """Withdrawal by layer, per prompt: KL of the first token in nats, tokens of the model's own answer that stay.

    Attributes:
        chosen: VTW's layer: the first whose mean KL is at most 0.003; None: there is none.
    """

    layers: tuple[int, ...]
    kinds: list[str]
    nats: list[list[float]]
    agreed: list[list[int]]
    lengths: list[int]
    chosen: int | None


class Stays(Record):
    """Place by place of the picture, in how many of so many prompts its token is in the last layer."""

    prompts: int
    stays: list[int]


class Text(Record):
    """Logits of prompts without a picture.

    Attributes:
        policies: how many they were computed under.
        logits: how many of them there are.
        changed: policies under which one has other bits, in a batch of text alone.
        beside: largest difference any policy makes in a batch beside pictures.
        turned: policies that change which token comes next there.
        host: what the batch beside pictures changes without a policy.
        largest: of the logits.
        meant, meant_changed: policies for all tokens, and how many of them change text, as they say.
    """

    policies: int
    logits: int
    changed: list[str]
    beside: float
    turned: list[str]
    host: float
    largest: float
    meant: int
    meant_changed: int


class SeedRecord(Record):
    """One trained model."""

    none: str
    """packed: single questions answered right without a policy"""
    single: dict[str, Answers]
    turns: dict[str, Talks]
    pictures: dict[str, str]
    stays: dict[str, Stays]
    first: First | None = None
    text: Text | None = None


class PoliciesRecord(StudyRecord):
    """A whole study.

    Attributes:
        kinds: of the single questions, in their order.
        seeds: training seed -> its model.
    """

    format: Literal["alula-policies-1"] = "alula-policies-1"
    kinds: list[str]
    seeds: dict[int, SeedRecord]

    @property
    def models(self) -> list[SeedRecord]:
        """In the order of the seeds."""
        return list(self.seeds.values())

    @cached_property
    def none(self) -> Marks:
        """Single questions answered right without a policy."""
        return marks([model.none for model in self.models])

    def right(self, row: str) -> Marks:
        """Single questions answered right under a policy."""
        return marks([model.single[row].right for model in self.models])

    def same(self, row: str) -> Marks:
        """Single questions answered as without a policy."""
        return marks([model.single[row].same for model in self.models])

    def has(self, row: str) -> bool:
        """Whether single questions were asked under a policy."""
        return all(row in model.single for model in self.models)

    def of(self, *kinds: str) -> NDArray[np.bool_]:
        """(items) the single questions of these kinds."""
        return np.isin(np.array(self.kinds), kinds)


def marks(packed: Sequence[str]) -> Marks:
    """Packed answers of each seed as numbers."""
    return np.array([unpacked(each) for each in packed], dtype=float)


def mean(differences: Marks) -> Estimate:
    """The mean over items, with an interval over trainings and items.

    Args:
        differences: (seeds, items) of scores, the same items for every seed.
    """
    return over_seeds(differences, CHANGE)


def apart(values: Marks, others: Marks) -> Estimate:
    """The mean difference of scores over some items less that over others, with an interval over trainings and
    items."""
    errors = [each.mean(axis=0).std(ddof=1) / np.sqrt(each.shape[1]) for each in (values, others)]
    per_seed = values.mean(axis=1) - others.mean(axis=1)
    fewest = min(values.shape[1], others.shape[1])
    found = seed_interval(per_seed.tolist(), float(np.hypot(*errors)), fewest)
    return bounded(found, (-2.0, 2.0), unseen(np.ones(fewest)))


def among(values: Marks, chosen: Marks, within: Range) -> Estimate | None:
    """The mean over items that each seed chooses for itself; intervals are over trainings alone, and one training has
    none. None: a seed chooses nothing.

    Args:
        within: what an item's value can be.
    """
    counts = chosen.sum(axis=1)
    if not counts.all():
        return None
    means = ((values * chosen).sum(axis=1) / counts).tolist()
    if len(means) == 1:
        return Estimate(means[0])
    return bounded(seed_interval(means, 0.0, values.shape[1]), within, unseen(np.ones(int(counts.min()))))


def gather_seed(found: Mapping[str, Any]) -> SeedRecord:
    """One seed's record, of its measurements by name."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        part, _, row = name.partition("/")
        parts.setdefault(part, {})[row] = value
    single = dict(parts["single"])
    none = single.pop("none")["right"]
    return SeedRecord(
        none=none,
        single={row: Answers(**value) for row, value in single.items()},
        turns={row: Talks(**value) for row, value in parts.get("turns", {}).items()},
        pictures={row: value["right"] for row, value in parts.get("pictures", {}).items()},
        stays={row: Stays(**value) for row, value in parts.get("stays", {}).items()},
        first=First(**parts["first"][""]) if "first" in parts else None,
        text=Text(**parts["text"][""]) if "text" in parts else None,
    )
