"""The quickstart's pieces of work, each in a process of its own and each skipped when its result is already there."""

from __future__ import annotations

import json
from pathlib import Path

from alula.evaluation import evaluate
from alula.files import read_json
from alula.jobs import lines
from alula.loading import load_model
from alula.training import train
from alula_fledgling.quickstart.plan import ALIGN, BASE, Plan

BATCH = 64  # prompts per generate call


def align(plan: Plan, seed: int) -> None:
    """Train the connector of the shared start."""
    train(plan.recipe(seed, ALIGN), quiet=True)


def answer_base(plan: Plan, seed: int) -> None:
    """Put all tasks to the aligned base."""
    answer(plan, seed, BASE, plan.aligned(seed))


def tune(plan: Plan, seed: int, method: str) -> None:
    """Train one method, then put all tasks to it."""
    result = train(plan.recipe(seed, method), quiet=True)
    answer(plan, seed, method, result.final)


def answers_path(plan: Plan, seed: int, name: str) -> Path:
    """The finished answers of one model."""
    return plan.seed_directory(seed) / f"{name}-answers.json"


def journal_path(plan: Plan, seed: int, name: str) -> Path:
    """The answers so far of one model."""
    return plan.seed_directory(seed) / f"{name}-answers.jsonl"


def answer(plan: Plan, seed: int, name: str, directory: Path) -> None:
    """Put all tasks to the model in ``directory``, unless it has answered."""
    path = answers_path(plan, seed, name)
    if path.is_file():  # the plan, and with it the questions, is pinned by the output directory
        return
    model, processor = load_model(directory)
    journal = journal_path(plan, seed, name)
    evaluate(model, processor, plan.questions(), name=name, batch_size=BATCH, journal=journal).save(path)


def progress_of(plan: Plan, seed: int, name: str) -> int:
    """Units of work a job has done: logged training steps and answered questions."""
    steps = lines(plan.run_directory(seed, name) / "metrics.jsonl") if name != BASE else 0
    answers = max(0, lines(journal_path(plan, seed, name)) - 1) if name != ALIGN else 0
    return steps + answers


def size_of(plan: Plan, seed: int, name: str, questions: int) -> int:
    """Units of work a job has in all."""
    steps = sum(stage.steps or 0 for stage in plan.recipe(seed, name).stages) if name != BASE else 0
    return steps + (questions if name != ALIGN else 0)


def training_facts(plan: Plan, seed: int, name: str) -> tuple[int, float]:
    """Trainable parameters and wall-clock seconds of a finished training."""
    run = plan.run_directory(seed, name)
    records = [read_json(path) for path in sorted(run.glob("stages/*/stage.json"))]
    last = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        last[row["stage"]] = row["seconds"]
    return max(record["trainable"] for record in records), sum(last.values())
