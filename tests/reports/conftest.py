"""A made-up experiment over real microworld questions: scores are drawn at random, so nothing here is a result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from transformers import AutoTokenizer

import alula_fledgling as fledgling
from alula.evaluation import Conditions, Decoding, ItemResult, RunResult, Task, TaskResult
from alula.evaluation.prompts import loaded, turns
from alula.inputs import Intake
from alula.reports import BaseOutcome, CurvePoint, MethodOutcome, Outcome, SeedOutcome
from alula_fledgling.tasks import native_tasks

CONDITIONS = Conditions(
    decoding=Decoding(),
    batch_size=64,
    dtype="float32",
    device="cpu",
    backend={"model": "sdpa", "text": "sdpa", "vision": "sdpa"},
    versions={"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "alula": "0.1.0"},
)
#                    text kept, seen, text kept after an image
ABILITIES = {
    "full": ("full fine-tuning", 0.90, 0.74, 0.80),
    "full_10x": ("full, 10x learning rate", 0.45, 0.70, 0.35),
    "lora": ("LoRA r16", 0.985, 0.72, 0.95),
    "replay": ("full + text replay", 0.97, 0.735, 0.93),
    "wings": ("Wings", 1.0, 0.73, 0.985),
}


def made_run(tasks: list[Task], name: str, score: Callable[[Task, int, str], bool]) -> RunResult:
    intake = Intake(AutoTokenizer.from_pretrained(fledgling.directory() / "llm"))
    results = {}
    for task in tasks:
        items = []
        for k, item in enumerate(task.items()):
            right = score(task, k, item.tags["kind"])
            items.append(
                ItemResult(
                    id=item.id,
                    family=item.family,
                    prompt_hash=item.id,
                    token_ids="1",
                    gold=item.gold,
                    answer=item.gold if right else f"{item.gold[::-1]} ?",
                    score=float(right),
                    cluster=item.cluster,
                    tags=dict(item.tags),
                    prompt=turns(loaded(item.messages, intake)),
                )
            )
        results[task.name] = TaskResult(name=task.name, title=task.title, max_new_tokens=32, settings={}, items=items)
    return RunResult(model=name, fingerprint=name, conditions=CONDITIONS, tasks=results, seconds=12.5)


def made_outcome(
    n: int = 200, seeds: tuple[int, ...] = (0, 1, 2), methods: tuple[str, ...] = tuple(ABILITIES)
) -> Outcome:
    tasks = native_tasks(n=n)
    rng = np.random.default_rng(0)
    knows = {task.name: rng.random(len(task.items())) < 0.96 for task in tasks}
    guesses = {task.name: rng.random(len(task.items())) < 0.17 for task in tasks}
    base = made_run(tasks, "base", lambda t, k, kind: bool(knows[t.name][k] if kind == "text" else guesses[t.name][k]))
    found = {}
    for name in methods:
        label, kept, seen, after = ABILITIES[name]
        trainings = {}
        for seed in seeds:
            shift = rng.normal(0, 0.006 if kept < 1 else 0)

            def score(t: Task, k: int, kind: str, kept=kept, seen=seen, after=after, shift=shift) -> bool:
                if kind == "visual":
                    return bool(rng.random() < seen + shift - 0.06 * (t.name == "visual_unseen"))
                share = kept if t.name == "text_bare" else after
                hard = k % 10 == 2  # one family suffers most
                keep = rng.random() < 1 - (1 - share - shift) * (4 if hard else 0.6) or share == 1
                return bool(knows[t.name][k] and keep) or bool(
                    not knows[t.name][k] and share < 1 and rng.random() < 0.1
                )

            steps = np.arange(1, 401, 4)
            loss = 2.6 * np.exp(-steps / 60) + 0.35 - 0.06 * seen + 0.04 * rng.random(len(steps))
            outcome = SeedOutcome.of(base, made_run(tasks, name, score), trainable_parameters=5_400_000, seconds=61.0)
            outcome.curve = [
                CurvePoint(stage="tune", step=int(s), loss=float(v)) for s, v in zip(steps, loss, strict=True)
            ]
            trainings[seed] = outcome
        found[name] = MethodOutcome(
            label=label,
            description="made-up numbers for a test",
            learning_rates={"projector": 1e-3, "llm": 5e-4 * (10 if "10x" in name else 1)},
            seeds=trainings,
        )
    align = [CurvePoint(stage="align", step=s, loss=3.0 * float(np.exp(-s / 80)) + 0.6) for s in range(1, 301, 3)]
    return Outcome(
        title="A base LLM becomes multimodal (made-up test data)",
        command="alula quickstart --seeds 0 1 2 --output runs/quickstart",
        created="2026-11-20T23:00:00+00:00",
        environment={"machine": "2 CPU cores", "commit": "0123abc"},
        seconds=1521.0,
        base=BaseOutcome(label="fledgling", description="tiny base", parameters=5_300_000),
        shared_curves=dict.fromkeys(seeds, align),
        methods=found,
    )


@pytest.fixture(scope="session")
def outcome() -> Outcome:
    return made_outcome(n=60, methods=("full", "lora", "wings"))
