"""What an ablation is: its arms, what is asked of them, and the comparisons it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RATE = 2e-3
"""the rate every part of every arm is trained at, unless the arm is about the rate"""

WINGS = {"rank": 64, "router": "mass", "gate": "exact", "normalize": True}
"""the Wings graft of the quickstart, from which each arm with learners departs in one respect"""

REPLAY = {"ratio": 0.25, "sources": [{"microworld": "text"}]}
"""text replay: a quarter of the samples"""


@dataclass(frozen=True)
class Arm:
    """One way of tuning.

    Attributes:
        name: under which it is kept, and asked for.
        label: its name for people.
        description: what it is.
        recipe: the packaged recipe it is made from.
        changes: keys of the recipe that it changes; with none it is a method of the quickstart.
        group: what it belongs to in figures, a name of `Ablation.groups`.
    """

    name: str
    label: str
    description: str
    group: str
    recipe: str = "full"
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A comparison the ablation is for: what it asks, and the arm with the answer against its reference."""

    asks: str
    arm: str
    against: str


@dataclass(frozen=True)
class Column:
    """A figure of every arm.

    Attributes:
        task: name of the task.
        title: of the column.
        short: title where differences stand.
        plain: what it is called in sentences.
        kept: the share of the base's accuracy that was kept, instead of the accuracy itself.
        kind: only the text or the visual items of a mixed task.
    """

    task: str
    title: str
    short: str
    plain: str
    kept: bool = False
    kind: str | None = None


@dataclass(frozen=True)
class Ablation:
    """Arms that start from one base, and what they are compared for.

    Attributes:
        name: of the study.
        title: the question it is about.
        arms: in the order of tables.
        questions: comparisons of one arm with another.
        columns: figures of every arm; their tasks are what is asked.
        groups: name of a group of arms -> its title.
        references: group -> names of arms of another group that its figure shows as well.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    questions: tuple[Question, ...]
    columns: tuple[Column, ...]
    groups: Mapping[str, str]
    references: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arms."""
        return tuple(arm.name for arm in self.arms)

    @property
    def tasks(self) -> tuple[str, ...]:
        """What is asked of every model."""
        return tuple(dict.fromkeys(column.task for column in self.columns))


def stage(method: str, train: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """Changes that make a recipe's stage one of ``method``, with parts at these rates and other keys of the stage."""
    return {f"stages.0.{key}": value for key, value in {"method": method, "train": dict(train), **more}.items()}


def wings(changes: Mapping[str, Any], *, train: Mapping[str, float] | None = None, **more: Any) -> dict[str, Any]:
    """Changes that make it a stage of `WINGS` with some settings and rates changed."""
    rates = {"wings": RATE, "projector": RATE, **(train or {})}
    return stage("wings", rates, wings={**WINGS, **changes}, **more)
