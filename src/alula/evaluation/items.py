"""What is asked and how it is scored: one question is a `TaskItem`, a scored set of them is a `Task`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from alula.errors import EvaluationError
from alula.evaluation.results import Ratio

Message = Mapping[str, Any]
"""``{"role": str, "content": [part, ...]}``, a part being ``{"type": "text", "text": str}`` or
``{"type": "image", "image": X}``, ``{"type": "video", "video": X}`` or ``{"type": "audio", "audio": X}``."""


@dataclass(frozen=True)
class TaskItem:
    """One scored question.

    Args:
        id: unique within its task and the same on every machine.
        family: the skill it belongs to; results are broken down by it.
        messages: the prompt, ending with a user turn. Images are PIL images or objects with ``.load()``.
        gold: the reference answer.
        cluster: items that share material (turns of one dialogue) carry the same cluster; intervals resample clusters,
            because answers within one are not independent. Empty: the item stands alone.
        tags: further labels kept beside the result, such as ``{"kind": "text", "pattern": "VT"}``.
        follows: ``(message index, item id)`` pairs: the assistant turns of the prompt to be replaced by the model's own
            answers to those items. Empty: the history is taken as written.
        scored: False for an item that is asked only because others follow it; it is left out of the results.
        place: file and line it was read from, for errors; empty where there is none.
    """

    id: str
    family: str
    messages: Sequence[Message]
    gold: str
    cluster: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    follows: tuple[tuple[int, str], ...] = ()
    scored: bool = True
    place: str = ""

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "user":
            last = self.messages[-1]["role"] if self.messages else "nothing"
            raise EvaluationError(
                f"the prompt must end with a user turn, it ends with {last}", where=f"item {self.id!r}"
            )


@runtime_checkable
class Task(Protocol):
    """Something scored. Attributes are read-only to the runner.

    ``name`` keys the results, ``title`` is for people, ``max_new_tokens`` bounds an answer, ``settings`` is what a
    reader needs to make the same items again (JSON values only).
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...

    def items(self) -> Sequence[TaskItem]:
        """Return the items, the same ones in the same order at every call."""
        ...

    def score(self, item: TaskItem, answer: str) -> float:
        """Return the score of ``answer`` in [0, 1]; 1 means correct."""
        ...


@runtime_checkable
class CountingTask(Task, Protocol):
    """A `Task` with figures beside its accuracy: ratios of what it counts in each answer."""

    @property
    def ratios(self) -> Sequence[Ratio]: ...

    def counts(self, item: TaskItem, answer: str | None) -> Mapping[str, float]:
        """Return the counts of ``answer`` by the names the ratios use; what is left out counts 0.

        None stands for an answer that never came, since the model's thought did not end.
        """
        ...


@dataclass(frozen=True)
class ItemTask:
    """A `Task` over items at hand (or made on first use) and a scoring function ``(item, answer) -> float``.

    ``counter`` with ``ratios`` makes it a `CountingTask`. ``answers`` is False where ``gold`` tells what is looked for
    in an answer and is none itself, so that how likely a model holds it means nothing.
    """

    name: str
    title: str
    source: Sequence[TaskItem] | Callable[[], Sequence[TaskItem]]
    scorer: Callable[[TaskItem, str], float]
    max_new_tokens: int = 32
    settings: Mapping[str, Any] = field(default_factory=dict)
    ratios: Sequence[Ratio] = ()
    counter: Callable[[TaskItem, str | None], Mapping[str, float]] | None = None
    answers: bool = True

    def items(self) -> Sequence[TaskItem]:
        """Return the items."""
        return self.source() if callable(self.source) else self.source

    def score(self, item: TaskItem, answer: str) -> float:
        """Score one answer."""
        return float(self.scorer(item, answer))

    def counts(self, item: TaskItem, answer: str | None) -> Mapping[str, float]:
        """Count what the ratios sum in one answer, or in none."""
        return self.counter(item, answer) if self.counter is not None else {}


def has_answers(task: Task) -> bool:
    """Whether the references of a task are answers, which a model may hold likely; True where it does not say."""
    return bool(getattr(task, "answers", True))


def media_of(messages: Sequence[Message]) -> Iterator[tuple[str, Any]]:
    """Yield ``(kind, value)`` of the images, videos and audio clips of ``messages`` in reading order."""
    for message in messages:
        for part in message["content"]:
            if part["type"] != "text":
                yield part["type"], part[part["type"]]


def images_of(messages: Sequence[Message]) -> Iterator[Any]:
    """Yield the image values of ``messages`` in reading order, still lazy where they were."""
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                yield part["image"]
