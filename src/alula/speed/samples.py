"""What is asked: the user's own questions about images, those that come with a model, or drawn pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Literal

import numpy as np
from PIL import Image

from alula.data import BadSampleError, Sample, open_file
from alula.errors import DataError
from alula.evaluation import Defaults, TaskItem, exact_match, named_tasks, prompts
from alula.evaluation.items import media_of
from alula.evaluation.own_data import item_of
from alula.inputs import Intake
from alula.speed.plan import Plan

Kind = Literal["localization", "reading"]

_KINDS: Mapping[Kind, frozenset[str]] = {
    "localization": frozenset(
        [
            "localization",
            "localisation",
            "location",
            "locating",
            "position",
            "spatial",
            "relation",
            "grounding",
            "refcoco",
            "refcocog",
            "referring",
            "detection",
            "pointing",
            "where",
        ]
    ),
    "reading": frozenset(
        ["ocr", "ocrbench", "reading", "textvqa", "docvqa", "chartqa", "infovqa", "infographicvqa", "stvqa", "digits"]
    ),
}
"""words by which records name what a question asks for"""
_LABELS = ("task", "category", "family", "skill", "kind", "type", "dataset")
"""keys of a record that may hold them"""
_SIZE = (640, 480)
_ASKED = ("Describe this picture.", "What is shown here, and where?", "List all you see, and its colours.")


@dataclass(frozen=True)
class Question:
    """A question about images.

    Attributes:
        item: what is asked; ``gold`` is empty where the answer is not known.
        max_new_tokens: most tokens of an answer.
        score: of an answer, in [0, 1].
        kind: localization or reading, where the data says so.
    """

    item: TaskItem
    max_new_tokens: int
    score: Callable[[str], float]
    kind: Kind | None = None


@dataclass(frozen=True)
class Chosen:
    """The questions of a measurement.

    Attributes:
        source: what they are, for people.
        invented: they are about drawn pictures, as neither the user nor the model brings any.
        without_image, unusable: records passed over.
    """

    source: str
    questions: tuple[Question, ...]
    invented: bool = False
    without_image: int = 0
    unusable: int = 0


def choose(plan: Plan, defaults: Defaults | None, takes: frozenset[str], intake: Intake) -> Chosen:
    """Find the questions.

    Args:
        defaults: those that come with the model, taken where the plan names no data.
        takes: the media the model takes.
        intake: of its processor.

    Raises:
        DataError: the file cannot be read, or no usable record of it shows an image.
    """
    if plan.data is not None:
        return _own(plan, takes, intake)
    if defaults is not None:
        return _with_model(plan, defaults, takes)
    return Chosen("drawn pictures", tuple(_drawn(plan)), invented=True)


def kind_of(labels: Iterable[str]) -> Kind | None:
    """What kind of question is named, if one of the words of `_KINDS` is: ``"spatial relation"``, ``"text_ocr"``."""
    words = {word for label in labels for word in re.split(r"[^a-z]+", label.casefold())}
    return next((kind for kind, known in _KINDS.items() if words & known), None)


def _own(plan: Plan, takes: frozenset[str], intake: Intake) -> Chosen:
    assert plan.data is not None
    source = open_file(plan.data, images=plan.images)
    found: list[Question] = []
    without, reasons = 0, []
    for index in range(source.size or 0):
        try:
            sample: Sample = source[index]
            if not sample.media(*takes):
                without += 1
                continue
            item = item_of(sample, answered=False)
            prompts.loaded(item.messages, intake)  # a picture that is not there is told now
        except (BadSampleError, DataError) as error:
            reasons.append(str(error))
            continue
        labels = [str(sample.meta[key]) for key in _LABELS if isinstance(sample.meta.get(key), str | int)]
        found.append(Question(item, plan.max_new_tokens, _against(item), kind_of(labels)))
        if len(found) == plan.samples:
            break
    if not found:
        first = f"; the first: {reasons[0]}" if reasons else ""
        raise DataError(
            f"no conversation shows an image ({without} without one, {len(reasons)} unusable{first})",
            where=str(plan.data),
            remedy="policies are about image tokens: give conversations with images",
        )
    return Chosen(plan.data.name, tuple(found), without_image=without, unusable=len(reasons))


def _against(item: TaskItem) -> Callable[[str], float]:
    return lambda answer: exact_match(item, answer)


def _with_model(plan: Plan, defaults: Defaults, takes: frozenset[str]) -> Chosen:
    """Of the tasks that come with a model the questions about media, task by task in turn."""
    tasks = named_tasks(defaults.tasks(takes), n=plan.samples, seed=plan.seed)
    columns: list[list[Question]] = []
    for task in tasks:
        column = []
        for item in task.items():
            if item.scored and item.tags.get("kind") != "text" and any(True for _ in media_of(item.messages)):
                limit = min(plan.max_new_tokens, task.max_new_tokens)
                score = _scored_by(task, item)
                column.append(Question(item, limit, score, kind_of([item.family])))
        columns.append(column)
    taken = [one for one in chain.from_iterable(zip_longest(*columns)) if one is not None][: plan.samples]
    names = [task.title for task, column in zip(tasks, columns, strict=True) if column]
    return Chosen(f"the questions that come with the model: {', '.join(names)}", tuple(taken))


def _scored_by(task: Any, item: TaskItem) -> Callable[[str], float]:
    return lambda answer: float(task.score(item, answer))


def _drawn(plan: Plan) -> Iterator[Question]:
    """Questions about pictures of soft colors with boxes in them: for time and agreement, and no more."""
    for number in range(plan.samples):
        text = _ASKED[number % len(_ASKED)]
        content = [{"type": "image", "image": _picture(plan.seed, number)}, {"type": "text", "text": text}]
        item = TaskItem(f"drawn-{number}", "drawn", [{"role": "user", "content": content}], gold="")
        yield Question(item, plan.max_new_tokens, _against(item))


def _picture(seed: int, number: int) -> Image.Image:
    draw = np.random.default_rng([seed, number])
    soft = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(_SIZE, Image.Resampling.BICUBIC)
    pixels = np.array(soft)
    for _ in range(6):
        left, top = draw.integers(0, _SIZE[0] - 60), draw.integers(0, _SIZE[1] - 60)
        wide, high = draw.integers(20, 200, 2)
        pixels[top : top + high, left : left + wide] = draw.integers(0, 256, 3)
    return Image.fromarray(pixels)
