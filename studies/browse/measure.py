"""Training an arm, and asking it: what it answers when told its own condition, none, and another question's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alula.evaluation import prompts
from alula.evaluation.items import TaskItem
from alula.files import write_json
from alula.grafts import grafts_of, read_conditions
from alula.inputs import Intake
from alula.loading import load_model
from alula.seam import LayerView, Owner, Phase, Point, generation_extras, install
from alula.training import train
from alula_fledgling.microworld import score
from alula_fledgling.tasks import native_tasks
from studies.browse.plan import ARMS, TASKS, TOLD, BrowsePlan

BATCH, LONGEST, LOOKED = 50, 32, 32
"""questions at a time, most tokens of an answer, questions that changes of image tokens are measured on"""
MOVED = "moved"
Right = dict[str, dict[str, dict[str, bool]]]
"""task -> what was told -> question -> whether it was answered right"""


def measurements(plan: BrowsePlan, seed: int) -> list[Path]:
    """The files that `measure` writes."""
    return [plan.measured(seed) / f"{name}.json" for name in (*ARMS, MOVED)]


def measure(plan: BrowsePlan, seed: int) -> None:
    """Train and ask every arm of a seed; what was measured before is left as it is."""
    *paths, last = measurements(plan, seed)
    for arm, path in zip(ARMS, paths, strict=True):
        if not path.is_file():
            result = train(plan.tuning(seed, arm), quiet=True)
            write_json(path, asked(plan, str(result.final)))
    if not last.is_file():
        finals = {arm: plan.own.run_directory(seed, arm) / "final" for arm in ARMS[1:]}
        write_json(last, {arm: moved(plan, str(final)) for arm, final in finals.items()})


@torch.no_grad()
def asked(plan: BrowsePlan, directory: str) -> dict[str, Any]:
    """Answers of a trained model, judged, by task and family."""
    loaded = load_model(directory)
    model, intake = loaded.model, Intake.of(loaded.processor)
    right: Right = {}
    families: dict[str, str] = {}
    for task in native_tasks(TASKS, n=1, seed=plan.task_seed):
        count = plan.asked(task.name)
        items = sorted(native_tasks([task.name], n=count, seed=plan.task_seed)[0].items(), key=lambda item: item.family)
        families |= {item.id: f"{task.name}: {item.family}" for item in items}
        for told in TOLD if grafts_of(model) else TOLD[:1]:
            judged = right.setdefault(task.name, {}).setdefault(told, {})
            for start in range(0, len(items), BATCH):
                part = items[start : start + BATCH]
                for item, answer in zip(part, _answers(model, intake, part, told), strict=True):
                    judged[item.id] = bool(score(item.family, item.gold, answer))
    return {"families": families, "right": right}


@torch.no_grad()
def moved(plan: BrowsePlan, directory: str) -> float:
    """How far a condition moves image tokens: the root mean square of the change over that of the tokens."""
    model, processor = load_model(directory)
    items = native_tasks(["pictures"], n=min(LOOKED, plan.items), seed=plan.task_seed)[0].items()
    inputs = _inputs(Intake.of(processor), list(items))
    conditions = read_conditions(model, inputs)
    seen: list[Tensor] = []

    def read(view: LayerView, hidden: Tensor) -> None:
        seen.append(hidden[view.tokens.is_perceptual].float())

    seam = install(model, MOVED, Owner())
    handle = seam.on(Point.BLOCK_INPUT, 0, read, phase=Phase.READ, owner=MOVED)
    try:
        for told in (conditions, torch.zeros_like(conditions)):
            model(**inputs, conditions=told)
    finally:
        handle.remove()
        seam.release(MOVED)
    own, none = seen
    return float(((own - none).square().mean() / none.square().mean()).sqrt())


def _answers(model: Any, intake: Intake, items: list[TaskItem], told: str) -> list[str]:
    inputs = _inputs(intake, items)
    with generation_extras(model, {**inputs, **_conditions(model, inputs, told)}) as given:
        ids = model.generate(**given, max_new_tokens=LONGEST, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [intake.tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]


def _inputs(intake: Intake, items: list[TaskItem]) -> dict[str, Tensor]:
    """Of prompts, padded on the left."""
    chats = [prompts.loaded(list(item.messages), intake) for item in items]
    intake.tokenizer.padding_side = "left"
    return dict(
        intake.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
    )


def _conditions(model: Any, inputs: Mapping[str, Tensor], told: str) -> dict[str, Tensor]:
    """What the connector is told, where that is not its own prompt's condition. Questions of one family stand side by
    side, so that another's condition is mostly one of its kind."""
    if told == "own":
        return {}
    conditions = read_conditions(model, inputs)
    return {"conditions": conditions.roll(1, dims=0) if told == "others" else torch.zeros_like(conditions)}
