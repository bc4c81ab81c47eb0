"""Questions whose options are weighed by how likely a model holds each: nothing is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from alula.errors import EvaluationError

Shape = Literal["one", "mass", "yes", "pair"]
"""how a task is scored:

one: the likeliest option is the one that is right (TruthfulQA's mc1);
mass: the share of the probability of all options that lies on those that are right (mc2);
yes: the likelier of two options is the right one, the second being what is called *yes* (ETHICS);
pair: as ``yes``, of questions which of two things is to be preferred, also asked the other way round."""


@dataclass(frozen=True)
class Question:
    """A text and what may stand behind it.

    Attributes:
        id: unique within its task.
        text: what the options stand behind: the whole prompt, or the words of a user's turn.
        options: at least two; of shapes ``yes`` and ``pair`` the second is *yes*.
        right: indices of those that are right.
        reverse: of shape ``pair`` the text with the two things in the other order, of which the other option is right.
        cluster: questions that share material carry the same; intervals resample clusters. Empty: it stands alone.
        tags: further labels kept beside the result.
    """

    id: str
    text: str
    options: tuple[str, ...]
    right: tuple[int, ...]
    reverse: str = ""
    cluster: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.options) < 2 or not self.right or len(set(self.right)) >= len(self.options):
            raise EvaluationError(
                f"has {len(self.options)} options, of which {len(set(self.right))} are right",
                where=f"question {self.id!r}",
                remedy="at least one must be right and one wrong",
            )


@dataclass(frozen=True)
class ChoiceTask:
    """Questions scored alike.

    Attributes:
        name: keys the results. title: is for people.
        groups: clusters are the published groups of related questions, of which the papers count those that are right
            as a whole.
        chat: questions are a user's turn in the model's chat template, options what the assistant says; otherwise
            plain text.
        settings: what a reader needs to make the questions again (JSON values only).
    """

    name: str
    title: str
    shape: Shape
    questions: Sequence[Question]
    groups: bool = False
    chat: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.questions:
            raise EvaluationError("has no questions", where=f"task {self.name!r}")
        ids = [question.id for question in self.questions]
        if len(set(ids)) < len(ids):
            twice = next(id for id in ids if ids.count(id) > 1)
            raise EvaluationError(f"two questions have the id {twice!r}", where=f"task {self.name!r}")
        for question in self.questions:
            fit = len(question.right) == 1 if self.shape != "mass" else True
            two = len(question.options) == 2 if self.shape in ("yes", "pair") else True
            if not (fit and two) or bool(question.reverse) != (self.shape == "pair"):
                raise EvaluationError(
                    f"does not fit a task of shape {self.shape!r}", where=f"task {self.name!r}, {question.id!r}"
                )
