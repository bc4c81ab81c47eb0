"""Asking models questions and comparing what they say, item by item.

`evaluate` puts tasks to one model; `compare` compares two runs of the same questions; `across_seeds` combines the
comparisons of several trainings. Results are records that save to JSON and load from it.
"""

from alula.evaluation.across_seeds import SeedsComparison, SeedsResult, Spread, across_seeds
from alula.evaluation.chair import chair_of_annotations
from alula.evaluation.defaults import Defaults, defaults_for
from alula.evaluation.hallucination import HALLUCINATION, ObjectFiles, object_tasks
from alula.evaluation.harness import HarnessTasks, run_harness
from alula.evaluation.items import ItemTask, Task, TaskItem
from alula.evaluation.likelihood import ChoiceTask, Question, evaluate_likelihood, read_truthfulness
from alula.evaluation.own_data import data_task
from alula.evaluation.pairing import compare
from alula.evaluation.pope import pope_of_annotations, pope_of_questions
from alula.evaluation.registry import check_names, named_tasks, task_names
from alula.evaluation.results import (
    Comparison,
    Conditions,
    Estimate,
    Flip,
    ItemResult,
    PairedResult,
    PairedRun,
    Ratio,
    RatioComparison,
    RunResult,
    TaskResult,
)
from alula.evaluation.retrieval import CaptionRun, Recall, evaluate_captions, recall_of
from alula.evaluation.runner import evaluate
from alula.evaluation.scoring import exact_match, normalise
from alula.evaluation.session import Session, choose_tasks, run_session
from alula.hosts.decoding import Decoding

__all__ = [
    "HALLUCINATION",
    "CaptionRun",
    "ChoiceTask",
    "Comparison",
    "Conditions",
    "Decoding",
    "Defaults",
    "Estimate",
    "Flip",
    "HarnessTasks",
    "ItemResult",
    "ItemTask",
    "ObjectFiles",
    "PairedResult",
    "PairedRun",
    "Question",
    "Ratio",
    "RatioComparison",
    "Recall",
    "RunResult",
    "SeedsComparison",
    "SeedsResult",
    "Session",
    "Spread",
    "Task",
    "TaskItem",
    "TaskResult",
    "across_seeds",
    "chair_of_annotations",
    "check_names",
    "choose_tasks",
    "data_task",
    "defaults_for",
    "recall_of",
    "run_session",
    "exact_match",
    "named_tasks",
    "normalise",
    "object_tasks",
    "compare",
    "pope_of_annotations",
    "pope_of_questions",
    "evaluate",
    "evaluate_captions",
    "evaluate_likelihood",
    "read_truthfulness",
    "run_harness",
    "task_names",
]
