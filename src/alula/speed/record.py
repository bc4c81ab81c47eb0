"""What was measured, as records that save to JSON and load from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field

from alula.evaluation.results import Comparison, Conditions, Estimate, Record


class Spread(Record):
    """A ratio to the model without a policy: median, lowest and highest over rounds, within each of which both ran."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The spread of one value per round."""
        return cls(median=statistics.median(values), low=min(values), high=max(values))


class Part(Record):
    """Some of the questions: how many answers are the model's own, and right."""

    n: int
    agreement: Estimate
    """share of whole answers that are the model's own, token for token, with Wilson's interval"""
    right: Comparison | None = None
    """paired with the model without a policy; of questions whose answer is known, None where none is"""


class Row(Record):
    """One policy, several together, or smaller pictures."""

    name: str
    policies: list[dict[str, Any]]
    """their settings"""
    pixels: float = 1.0
    """the share of its pixels that every picture kept; below 1 there is no policy"""
    refused: str = ""
    """why the host does not take it; nothing below is measured then"""
    operations: float | None = None
    """multiplications of matrices in a prompt, over those of the model without a policy; towers included"""
    step_operations: float | None = None
    """the same of one step behind it"""
    prefill: Spread | None = None
    """time of a batch of prompts, media included, until their first token"""
    step: Spread | None = None
    """time of a further token"""
    answer: Spread | None = None
    """time of a whole answer, of the length that answers of the model have"""
    cache_bytes: int = 0
    """held by the KV cache behind one prompt"""
    cache: float | None = None
    """the same over that of the model without a policy"""
    kept: float | None = None
    """share of the keys of image tokens that the cache holds, mean over layers"""
    parts: dict[str, Part] = Field(default_factory=dict)
    """`"all"`; `"easy"` and `"hard"`: those that pooling to the same share kept gets right, and the others;
    `"localization"` and `"reading"`, where the data says which questions are such"""

    @property
    def agreement(self) -> float | None:
        """Of all questions."""
        return self.parts["all"].agreement.value if "all" in self.parts else None

    @property
    def accuracy(self) -> float | None:
        """Of all questions whose answer is known."""
        right = self.parts["all"].right if "all" in self.parts else None
        return None if right is None else right.tuned.value

    @property
    def retention(self) -> float | None:
        """Accuracy over that of the model without a policy."""
        right = self.parts["all"].right if "all" in self.parts else None
        return None if right is None or right.retention is None else right.retention.value


class Host(Record):
    """The model without a policy."""

    prefill_seconds: float
    """median over rounds, of one batch of prompts"""
    step_seconds: float
    answer_tokens: float
    """mean length of an answer"""
    decode_share: float
    """of the time of a whole answer, spent behind the prompt"""
    operations: float
    """multiply-adds times two of matrix products in one prompt"""
    tower_share: float
    """of these, in towers, which no policy touches"""
    cache_bytes: int
    accuracy: Estimate | None


class Speed(Record):
    """A measurement."""

    format: Literal["alula-speed-1"] = "alula-speed-1"
    model: str
    model_class: str
    parameters: int
    layers: int
    source: str
    """what was asked"""
    invented: bool
    """the pictures are drawn, and nothing is known of answers"""
    n: int
    answered: int
    """questions whose answer is known"""
    without_image: int
    unusable: int
    too_long: int
    prompt_tokens: int
    """median"""
    image_tokens: int
    """median, per prompt"""
    is_accelerated: bool
    clock: str
    host: Host
    itself: Spread
    """the model beside itself, as the policies are beside it: what is noise"""
    rows: list[Row]
    settings: dict[str, Any]
    conditions: Conditions
    environment: dict[str, str]
    created: str
    command: str
    seconds: float

    @property
    def passed_over(self) -> str:
        """How many records of which kind were; empty if none was."""
        counts = ((self.without_image, "without an image"), (self.unusable, "unusable"), (self.too_long, "too long"))
        return ", ".join(f"{many} {kind}" for many, kind in counts if many)
