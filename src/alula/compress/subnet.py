"""One subnetwork for several tasks (IMA, arXiv 2405.16700, section on alpha-SubNets), and what it is to be held
against.

A weight that only those keep whom every task needs is a weight of a mask that is sparser than any of theirs. Whoever
compares it with another mask has to compare at that sparsity, the effective one, which every mask says
(`WeightMask.sparsity`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Literal

from torch import nn

from alula.compress.calibration import Batches
from alula.compress.pruning import find_mask
from alula.compress.settings import WeightPruning
from alula.errors import AlulaError, UsageError
from alula.weights import WeightMask

Rule = Literal["intersection", "majority", "union"]
"""A weight is kept where all tasks keep it (the alpha-SubNet as published), more than half of them, or any."""


def task_masks(model: nn.Module, settings: WeightPruning, tasks: Mapping[str, Batches]) -> dict[str, WeightMask]:
    """One mask per task, each from its own data alone. The model is left as it was, bit for bit.

    Raises:
        UsageError, HostError, DataError: see `find_mask`; named by task.
    """
    if not settings.needs_data:
        raise UsageError(f"{settings.method} finds the same mask for every task", remedy="use Wanda or SparseGPT")
    found = {}
    for task, batches in tasks.items():
        try:
            found[task] = find_mask(model, settings, batches)
        except AlulaError as error:
            where = ": ".join(filter(None, (f"task {task!r}", error.where)))
            raise type(error)(error.message, where=where, remedy=error.remedy) from error
    return found


def shared_mask(masks: Mapping[str, WeightMask], rule: Rule = "intersection") -> WeightMask:
    """One mask of those of several tasks. ``made`` says the effective sparsity beside that of each task.

    Raises:
        UsageError: fewer than two masks, or masks of different matrices or models.
    """
    if len(masks) < 2:
        raise UsageError(f"{len(masks)} masks share nothing", remedy="find the masks of two tasks or more")
    if len(models := {mask.made.get("model") for mask in masks.values()}) > 1:
        raise UsageError(f"the masks are of {len(models)} models", remedy="find all of them on one model")
    count = len(masks)
    least = {"intersection": count, "majority": count // 2 + 1, "union": 1}.get(rule)
    if least is None:
        raise UsageError(f"no rule {rule!r}", remedy="use intersection, majority or union")
    found = WeightMask.kept_by([*masks.values()], least)
    made: dict[str, Any] = {
        "rule": rule,
        "sparsity": round(found.sparsity, 6),
        "sparsity_of_tasks": {task: round(mask.sparsity, 6) for task, mask in masks.items()},
        "tasks": {task: dict(mask.made) for task, mask in masks.items()},
    }
    if (model := next(iter(masks.values())).made.get("model")) is not None:
        made["model"] = model
    return WeightMask(found.bits, found.shapes, made)


class Pooled:
    """The data of several tasks as those of one, task after task."""

    def __init__(self, tasks: Mapping[str, Batches]) -> None:
        self.tasks = tasks

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return chain.from_iterable(self.tasks.values())


def pooled_mask(
    model: nn.Module, settings: WeightPruning, tasks: Mapping[str, Batches], like: WeightMask
) -> WeightMask:
    """The honest rival of a shared mask: one mask from the data of all tasks that keeps as many weights of each matrix.

    Args:
        settings: those of the tasks; how much is pruned is what `like` prunes.
        like: the shared mask.

    Raises:
        UsageError, HostError, DataError: see `find_mask`.
    """
    alike = WeightPruning(**{**settings.model_dump(), "sparsity": None, "pattern": None})
    return find_mask(model, alike, Pooled(tasks), like=like)
