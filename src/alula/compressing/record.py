"""What was tried, as records that save to JSON and load from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from alula.evaluation.results import Comparison, Conditions, Record

SKILLS: Mapping[str, str] = {"retention": "text", "visual": "visual"}
"""which skill a budget's name is of"""


class Trial(Record):
    """One amount, evaluated against the model as it was."""

    name: str
    share: float
    """asked for"""
    saved: float
    """share of all of the model's parameters that are gone, or zero where they were none"""
    parameters: int
    fingerprint: str
    """of the weights, see `alula.evaluation.conditions.fingerprint`"""
    text: Comparison | None
    """questions of text, paired; None where there are none"""
    visual: Comparison | None
    made: dict[str, Any]
    """what was taken out, or what made the mask"""
    seconds: float

    def kept(self, name: str) -> float | None:
        """What a budget of this name is held against; None where the model as it was answers nothing right."""
        found: Comparison | None = getattr(self, SKILLS[name])
        return None if found is None or found.retention is None else found.retention.value

    def margin(self, budget: Mapping[str, float]) -> float:
        """By how much it keeps more than a budget asks for, at its tightest; 1 without a budget."""
        return min((_or_nothing(self.kept(name)) - least for name, least in budget.items()), default=1.0)


def _or_nothing(value: float | None) -> float:
    return -1.0 if value is None else value


class Compressed(Record):
    """A compression."""

    format: Literal["alula-compress-1"] = "alula-compress-1"
    model: str
    model_class: str
    kind: str
    parameters: int
    """of the model as it was"""
    layers: int
    budget: dict[str, float] | None
    chosen: str
    """name of the trial that was saved"""
    possible: list[str]
    """all amounts that could have been tried, the least first"""
    trials: list[Trial]
    """those that were, the least first"""
    calibrated: str
    """what scores were taken from; empty where nothing was looked at"""
    asked: str
    bytes_before: int
    """of the weights, in the precision they have"""
    bytes_after: int
    """of the files of weights that were written"""
    coded: bool
    settings: dict[str, Any]
    conditions: Conditions
    environment: dict[str, str]
    created: str
    command: str
    seconds: float

    @property
    def trial(self) -> Trial:
        """The one that was saved."""
        return next(trial for trial in self.trials if trial.name == self.chosen)
