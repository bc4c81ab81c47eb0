"""What scores are taken from, and what is asked: never the same conversations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alula.bounds import MAX_SEED
from alula.compress import Batches, MixtureBatches
from alula.compressing.plan import SAMPLES, Plan
from alula.data import BadSampleError, Collator, Mixture, Sample, open_file, open_source
from alula.errors import DataError, UsageError
from alula.evaluation import Defaults, ItemTask, Task, TaskItem, exact_match, named_tasks, prompts
from alula.evaluation.items import media_of
from alula.evaluation.own_data import item_of
from alula.inputs import Intake

_APART = 43


@dataclass(frozen=True)
class Chosen:
    """The data of a compression.

    Attributes:
        tasks: what is asked.
        batches: what scores are taken from; None where nothing is looked at.
        asked, calibrated: what they are, for people.
        own: all conversations of the user's that play a part, in their order; none where they come with the model.
    """

    tasks: Sequence[Task]
    batches: Batches | None
    asked: str
    calibrated: str
    own: Sequence[TaskItem] = ()

    def digest(self, intake: Intake) -> str:
        """sha256 (hex) of the user's conversations as the model is given them, media included, and of right answers."""
        digest = hashlib.sha256()
        for item in self.own:
            messages = prompts.loaded(item.messages, intake)
            rendered = prompts.encode(intake, messages, where=f"conversation {item.id!r}")
            digest.update(f"{item.id}\n{rendered.hash}\n{item.gold}\n".encode())
        return digest.hexdigest()

    def kinds(self) -> dict[str, dict[str, str]]:
        """By task and item, "text" or "visual": of what skill a question is."""
        return {task.name: {item.id: _kind(item) for item in task.items() if item.scored} for task in self.tasks}


class _Samples:
    """Samples at hand as batches, made anew each time they are gone through."""

    def __init__(self, samples: Sequence[Sample], collate: Collator, size: int) -> None:
        self.samples, self.collate, self.size = samples, collate, size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.samples), self.size):
            yield dict(self.collate(self.samples[start : start + self.size]))


def choose(plan: Plan, defaults: Defaults | None, takes: frozenset[str], collate: Collator) -> Chosen:
    """Find the questions and what scores are taken from.

    Args:
        defaults: those that come with the model, taken where the plan names no data.
        takes: the media the model takes.

    Raises:
        UsageError: the plan names no data, and none come with the model. DataError: the file cannot be read, or
            holds too little.
    """
    if plan.data is not None:
        return _own(plan, takes, collate)
    if defaults is None:
        raise UsageError(
            "say what to ask: no questions come with this model",
            where="--data",
            remedy="--data FILE [--images FOLDER]: conversations of text and with images, with reference answers",
        )
    tasks = named_tasks(defaults.tasks(takes), n=plan.items, seed=plan.seed)
    counts = {task.title: sum(item.scored for item in task.items()) for task in tasks}
    each = "; ".join(f"{count} of {title!r}" for title, count in counts.items())
    asked = f"{sum(counts.values())} questions that come with the model ({each})"
    if not plan.needs_data:
        return Chosen(tasks, None, asked, "")
    text, _ = defaults.retention()
    title, specs = defaults.audited() if takes else ("questions of text", [])
    # another seed than that of the questions: what is asked is not calibrated on
    seed = (plan.seed + _APART) % (MAX_SEED + 1)
    mixture = Mixture([open_source({**spec, "seed": seed}) for spec in (*specs, text)], seed=plan.seed)
    many = plan.calibration or SAMPLES
    batches = MixtureBatches(mixture, collate, samples=many, batch_size=plan.batch_size)
    return Chosen(tasks, batches, asked, f"{many} {title}" + (" and questions of text" if takes else ""))


def _own(plan: Plan, takes: frozenset[str], collate: Collator) -> Chosen:
    """Conversations of the user's file, in an order that the seed draws: the first are calibrated on, others asked."""
    assert plan.data is not None
    source = open_file(plan.data, images=plan.images)
    order = np.random.default_rng(plan.seed).permutation(source.size or 0).tolist()
    wanted = (plan.calibration or SAMPLES) if plan.needs_data else 0
    seen: list[Sample] = []
    items: list[TaskItem] = []
    own: list[TaskItem] = []
    reasons: list[str] = []
    for index in order:
        try:
            sample = source[index]
            item = item_of(sample)
        except (BadSampleError, DataError) as error:
            reasons.append(str(error))
            continue
        if {kind for kind, _ in media_of(item.messages)} - takes:
            reasons.append(f"{sample.id} shows what the model does not take")
        elif len(seen) < wanted:
            seen.append(sample)
            own.append(item)
        elif len(items) < plan.items:
            items.append(item)
            own.append(item)
        else:
            break
    if not items:
        passed = f"; {len(reasons)} unusable, the first: {reasons[0]}" if reasons else ""
        raise DataError(
            f"holds {len(seen)} usable conversations, {wanted} to calibrate on and none to ask{passed}",
            where=str(plan.data),
            remedy="give more conversations that end with a reference answer, or a smaller --calibration",
        )
    name = plan.data.name
    task = ItemTask(
        name=name, title=name, source=items, scorer=exact_match, max_new_tokens=plan.max_new_tokens,
        settings={"source": str(plan.data), "seed": plan.seed},
    )  # fmt: skip
    batches = _Samples(seen, collate, plan.batch_size) if wanted else None
    calibrated = f"{len(seen)} conversations of {name}" if wanted else ""
    asked = f"{len(items)} other conversations of {name}" if wanted else name
    return Chosen([task], batches, asked, calibrated, own)


def _kind(item: TaskItem) -> str:
    told = item.tags.get("kind") or next((kind for kind, _ in media_of(item.messages)), "text")
    return "text" if told == "text" else "visual"
