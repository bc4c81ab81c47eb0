"""Asking models questions and comparing what they say, item by item.

`run` puts tasks to one model; `paired` compares two runs of the same questions; `across_seeds` combines the comparisons
of several trainings. Results are records that save to JSON and load from it.
"""

from alula.evaluation.across_seeds import SeedsComparison, SeedsResult, Spread, across_seeds
from alula.evaluation.harness import HarnessTasks, run_harness
from alula.evaluation.items import ItemTask, Task, TaskItem
from alula.evaluation.native import DEFAULT, NATIVE, TEXT_ONLY, native_tasks
from alula.evaluation.own_data import data_task
from alula.evaluation.pairing import paired
from alula.evaluation.results import (
    Comparison,
    Conditions,
    Decoding,
    Estimate,
    Flip,
    ItemResult,
    PairedResult,
    PairedRun,
    RunResult,
    TaskResult,
)
from alula.evaluation.runner import run
from alula.evaluation.scoring import exact_match, normalise
from alula.evaluation.session import Session, choose_tasks, evaluate

__all__ = [
    "DEFAULT",
    "NATIVE",
    "TEXT_ONLY",
    "Comparison",
    "Conditions",
    "Decoding",
    "Estimate",
    "Flip",
    "HarnessTasks",
    "ItemResult",
    "ItemTask",
    "PairedResult",
    "PairedRun",
    "RunResult",
    "SeedsComparison",
    "SeedsResult",
    "Session",
    "Spread",
    "Task",
    "TaskItem",
    "TaskResult",
    "across_seeds",
    "choose_tasks",
    "data_task",
    "evaluate",
    "exact_match",
    "native_tasks",
    "normalise",
    "paired",
    "run",
    "run_harness",
]
