"""What an evaluation leaves behind: typed, JSON both ways, sufficient to recompute every figure shown from it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alula.errors import EvaluationError
from alula.files import regular, unreadable, write_text
from alula.hosts.decoding import Decoding
from alula.stats import Estimate as Estimate
from alula.stats import Side

_NAMED = 5
"""items that a note names"""


class Record(BaseModel):
    """Base of the result records: closed (an unknown key is an error), saved atomically as JSON."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record to ``path`` atomically and return the path."""
        return write_text(path, self.model_dump_json(exclude_defaults=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a record written by `save`.

        Raises:
            EvaluationError: the file is missing, is not JSON, or is not this kind of record (the key is named).
        """
        try:
            return cls.model_validate_json(regular(path).read_bytes())
        except OSError as error:
            raise unreadable(error, path, EvaluationError) from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(step) for step in first["loc"]) or "file"
            raise EvaluationError(
                f"is no {cls.__name__}: {key}: {first['msg']}",
                where=str(path),
                remedy="give the JSON file this version of alula wrote, or run the evaluation again",
            ) from error


class Part(Record):
    """A piece of a turn: a text, or an image as a data URI."""

    text: str | None = None
    image: str | None = None


class Turn(Record):
    """A message of a prompt."""

    role: str
    content: list[Part]


class Conditions(Record):
    """The circumstances of a run that may move its scores."""

    decoding: Decoding
    batch_size: int
    dtype: str
    device: str
    backend: dict[str, str]
    """attention implementation per sub-model, ``{"model": "sdpa", ...}``"""
    versions: dict[str, str]
    template: dict[str, Any] = {}
    """what the chat template was told beside the messages, see `alula.chat_template.TemplateSettings`"""
    policies: list[dict[str, Any]] = []
    """settings of the policies that held"""
    shots: int = 0
    """demonstrations before every question, as fused tokens"""

    @property
    def policies_in_words(self) -> list[str]:
        """Each policy's type and settings, e.g. "withdraw (layer=16, positions=keep)"."""
        told = []
        for policy in self.policies:
            settings = ", ".join(f"{key}={value}" for key, value in policy.items() if key != "policy_type")
            told.append(f"{policy.get('policy_type')} ({settings})")
        return told


class Ratio(Record):
    """A figure of a task beside its accuracy: a ratio of sums of what is counted per item, such as precision.

    ``over`` and ``under`` weigh the counts (`ItemResult.counts`) in numerator and denominator.
    """

    name: str
    title: str
    over: dict[str, float]
    under: dict[str, float]
    better: Literal["higher", "lower", ""] = ""
    unit: Literal["share", "number", "nats"] = "share"
    topic: str = "Objects made up"
    """what reports call the section it stands in"""


class ItemResult(Record):
    """One answered item; ``score`` is in [0, 1] and 1 means correct."""

    id: str
    family: str
    prompt_hash: str
    token_ids: str = ""
    """the ids the model was asked with, see `alula.evaluation.token_ids`; empty in files of earlier versions"""
    gold: str
    answer: str
    score: float
    truncated: bool = False
    """the answer ran into ``max_new_tokens``, or into the end of the model's context"""
    thought: str = ""
    """what the model thought aloud before its answer; it is not scored"""
    unfinished: bool = False
    """the thought never ended, so there is no answer: the score is 0"""
    cluster: str = ""
    tags: dict[str, str] = {}
    counts: dict[str, float] = {}
    """what the task's ratios sum"""
    prompt: list[Turn] = []


class TooLong(Record):
    """An item that was not asked: its prompt of so many ``tokens`` leaves no room for an answer in the context."""

    id: str
    family: str
    tokens: int


class TaskResult(Record):
    """All items of one task, in the task's order."""

    name: str
    title: str
    max_new_tokens: int
    settings: dict[str, Any]
    items: list[ItemResult] = Field(min_length=1)
    unscored: list[str] = []
    """ids of items that are not among ``items``, since what scores them came to no number"""
    too_long: list[TooLong] = []
    """what was not asked; every figure is of ``items`` alone"""
    unweighed: list[str] = []
    """references that were not weighed (`alula.evaluation.references`), and why; of a task of which none was, why"""
    context: int | None = None
    """tokens that prompt and answer may take together; None: no bound is known"""
    ratios: list[Ratio] = []
    figures: dict[str, dict[str, Estimate | None]] = {}
    """value and interval of every ratio by its name, per group: ``"all"`` and, where there are several, each family;
    None where the denominator is 0"""

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return sum(item.score for item in self.items) / len(self.items)

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures must know, as sentences without a full stop."""
        found, n = [], len(self.items)
        if bad := self.settings.get("bad"):
            others = [f"and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else []
            found.append(f"{len(bad)} bad records were left out: {'; '.join([*bad[:_NAMED], *others])}")
        if self.too_long:
            named = [f"{item.id!r} ({item.tokens} tokens)" for item in self.too_long[:_NAMED]]
            more = len(self.too_long) - len(named)
            found.append(
                f"{len(self.too_long)} of {n + len(self.too_long)} questions were not asked, since they do not fit "
                f"into the model's context of {self.context} tokens: {', '.join(named)}"
                + (f" and {more} more" if more else "")
                # where families share their questions, those of others are no longer the same ones
                + (f"; by family: {self._left_out()}" if len(self.families) > 1 else "")
            )
        if self.unscored:
            named = [*self.unscored[:_NAMED], *(["..."] if len(self.unscored) > _NAMED else [])]
            found.append(f"left out, since the score is not a number ({len(self.unscored)}): {', '.join(named)}")
        if self.unweighed:
            named = [*self.unweighed[:_NAMED], *(["..."] if len(self.unweighed) > _NAMED else [])]
            some = any(ratio.unit == "nats" for ratio in self.ratios)
            what = f"how likely references are leaves out ({len(self.unweighed)})" if some else "references not weighed"
            found.append(f"{what}: {', '.join(named)}")
        if cut := sum(item.truncated for item in self.items):
            found.append(f"{cut} of {n} answers did not end within {self.max_new_tokens} tokens")
        if lost := sum(item.unfinished for item in self.items):
            found.append(f"{lost} of {n} answers never left their thought and count as wrong")
        return found

    def _left_out(self) -> str:
        counts = Counter(item.family for item in self.too_long)
        return ", ".join(f"{family} {count}" for family, count in counts.items())

    @property
    def families(self) -> list[str]:
        """Family names in order of first appearance."""
        return list(dict.fromkeys(item.family for item in self.items))


class RunResult(Record):
    """One model's answers to all tasks."""

    format: Literal["alula-run-1"] = "alula-run-1"
    model: str
    fingerprint: str
    """of the weights, see `alula.evaluation.conditions.fingerprint`"""
    conditions: Conditions
    tasks: dict[str, TaskResult] = Field(min_length=1)
    seconds: float


class Comparison(Record):
    """Two models on the same items."""

    n: int
    base: Estimate
    """mean score of the base, with its Wilson interval"""
    tuned: Estimate
    difference: Estimate
    """tuned minus base, with its paired interval: a bootstrap's, but see ``exact``"""
    retention: Estimate | None
    """tuned divided by base, likewise; None where the base scores nothing"""
    exact: tuple[Side, ...] = ()
    """sides of both intervals that hold the exact binomial bound, since no item fell ("low") or rose ("high") and
    resampling has nothing to vary there (`alula.stats.Unmoved`)"""
    lost: int
    gained: int
    p_value: float
    """exact McNemar test of lost against gained"""


class FamilyComparison(Comparison):
    """The same for one family; ``p_holm`` is corrected over the families of the task."""

    p_holm: float


class RatioComparison(Record):
    """A ratio of both models on the same items; the interval of the difference resamples them together.

    A value is None where its denominator is 0.
    """

    base: Estimate | None
    tuned: Estimate | None
    difference: Estimate | None


class Flip(Record):
    """An item only one of the two models got right, with all a reader needs to judge it."""

    id: str
    family: str
    prompt: list[Turn]
    gold: str
    base_answer: str
    tuned_answer: str


class Labels(Record):
    """A label per item, as indices into the distinct ``values``."""

    values: list[str]
    index: list[int]

    @classmethod
    def of(cls, labels: Sequence[str]) -> Self:
        """Collect labels; values stand in order of first appearance."""
        values = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        return cls(values=list(values), index=[values[label] for label in labels])


class Columns(Record):
    """Scores and labels per item, in the task's order: enough to recompute every statistic.

    ``cluster`` numbers the independent units; ``labels`` holds ``"family"``, ``"kind"`` (text or
    visual skill, where the items say) and every other tag that varies over the items.
    """

    labels: dict[str, Labels]
    cluster: list[int]
    base: list[float]
    tuned: list[float]


class PairedResult(Record):
    """`Comparison` of one task, overall and per family, with the items lost and gained."""

    task: str
    title: str
    confidence: float
    overall: Comparison
    families: dict[str, FamilyComparison]
    identical_answers: int
    """items whose two answers agree character for character"""
    lost: list[Flip]
    gained: list[Flip]
    """kept flips are spread evenly over the families; the counts in ``overall`` are of all of them"""
    items_digest: str
    """sha256 over the items' ids and prompt hashes"""
    columns: Columns
    ratios: list[Ratio] = []
    figures: dict[str, dict[str, RatioComparison]] = {}
    """as `TaskResult.figures`, of both models"""
    notes: list[str] = []


class PairedRun(Record):
    """Every task that both models answered."""

    format: Literal["alula-paired-1"] = "alula-paired-1"
    base: str
    tuned: str
    base_conditions: Conditions
    tuned_conditions: Conditions
    tasks: dict[str, PairedResult] = Field(min_length=1)
