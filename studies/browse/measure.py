"""Training an arm, and asking it: what it answers when told its own condition, none, and another question's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alula.data import IGNORED, Collator
from alula.evaluation import prompts
from alula.evaluation.items import TaskItem
from alula.files import write_json
from alula.grafts import grafts_of, read_conditions
from alula.inputs import Intake
from alula.loading import load_model
from alula.seam import LayerView, Owner, Phase, Point, generation_extras, install
from alula.training import train
from alula.training.browsing import prompt_of
from alula_fledgling.microworld import score
from alula_fledgling.microworld.scenes import COLOURS
from alula_fledgling.sources import MicroworldSource
from alula_fledgling.tasks import native_tasks
from studies.browse.plan import ARMS, TASKS, TOLD, BrowsePlan
from studies.examples import Said, Shown

BATCH, LONGEST, LOOKED = 50, 32, 32
"""questions at a time, most tokens of an answer, questions that changes of image tokens are measured on"""
READ = 480
"""prompts that asked colours are read off conditions of, three quarters of which the reading is learnt from"""
MOVED, CAPTIONED, HELD = "moved", "captioned", "held"
Right = dict[str, dict[str, dict[str, bool]]]
"""task -> what was told -> question -> whether it was answered right"""


def measurements(plan: BrowsePlan, seed: int) -> list[Path]:
    """The files that `measure` writes."""
    return [plan.measured(seed) / f"{name}.json" for name in (*ARMS, MOVED, CAPTIONED, HELD)]


def measure(plan: BrowsePlan, seed: int) -> None:
    """Train and ask every arm of a seed; what was measured before is left as it is."""
    *paths, moves, captions, holds = measurements(plan, seed)
    for arm, path in zip(ARMS, paths, strict=True):
        if not path.is_file():
            result = train(plan.tuning(seed, arm), quiet=True)
            write_json(path, asked(plan, str(result.final)))
    if not moves.is_file():
        finals = {arm: plan.own.run_directory(seed, arm) / "final" for arm in ARMS[1:]}
        write_json(moves, {arm: moved(plan, str(final)) for arm, final in finals.items()})
    if not captions.is_file():
        write_json(captions, captioned(plan, str(plan.captioning(seed))))
    if not holds.is_file():
        write_json(holds, held(plan, str(plan.model(seed))))


@torch.no_grad()
def asked(plan: BrowsePlan, directory: str) -> dict[str, Any]:
    """Answers of a trained model, judged, by task and family; of each family about several pictures one to look at."""
    loaded = load_model(directory)
    model, intake = loaded.model, Intake.of(loaded.processor)
    right: Right = {}
    families: dict[str, str] = {}
    shown: dict[str, Shown] = {}
    for task in native_tasks(TASKS, n=1, seed=plan.task_seed):
        count = plan.asked(task.name)
        items = sorted(native_tasks([task.name], n=count, seed=plan.task_seed)[0].items(), key=lambda item: item.family)
        families |= {item.id: f"{task.name}: {item.family}" for item in items}
        firsts = {item.family: item.id for item in reversed(items)}.values() if task.name == TASKS[0] else ()
        for told in TOLD if grafts_of(model) else TOLD[:1]:
            judged = right.setdefault(task.name, {}).setdefault(told, {})
            for start in range(0, len(items), BATCH):
                part = items[start : start + BATCH]
                for item, answer in zip(part, _answers(model, intake, part, told), strict=True):
                    judged[item.id] = bool(score(item.family, item.gold, answer))
                    if item.id in firsts:
                        if item.id not in shown:
                            prompt = prompts.turns(prompts.loaded(list(item.messages), intake))
                            shown[item.id] = Shown(family=item.family, prompt=prompt, gold=item.gold, answers={})
                        shown[item.id].answers[told] = Said(text=answer, right=judged[item.id])
    return {"families": families, "right": right, "shown": [each.model_dump() for each in shown.values()]}


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


@torch.no_grad()
def captioned(plan: BrowsePlan, directory: str) -> dict[str, list[float]]:
    """What captions of what matters cost a model that learnt to write them, in nats per token, by what it is told. What
    matters stands in the condition alone."""
    model, processor = load_model(directory)
    source, collate = MicroworldSource("pictures_caption", split="test"), Collator(processor)
    reading = Collator(processor, train=False)
    order = sorted((source[index] for index in range(plan.items)), key=lambda sample: str(sample.meta["family"]))
    found: dict[str, list[float]] = {told: [] for told in TOLD}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        conditions = read_conditions(model, reading([prompt_of(sample) for sample in part]))
        batch = dict(collate(part))
        labels = batch.pop("labels")[:, 1:]
        for told in TOLD:
            logits = model(**batch, conditions=_told(conditions, told)).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
            )
            found[told] += (losses.sum(dim=1) / (labels != IGNORED).sum(dim=1)).tolist()
    return found


@torch.no_grad()
def held(plan: BrowsePlan, directory: str) -> float:
    """How often the colour that is asked for can be read off a condition by a linear map: held-out questions, which
    picture shows a thing. Chance is one in six."""
    model, processor = load_model(directory)
    source, collate = MicroworldSource("pictures", families=["which"]), Collator(processor, train=False)
    read, colours = [], []
    for start in range(0, READ, BATCH):
        samples = [prompt_of(source[index]) for index in range(start, min(READ, start + BATCH))]
        read.append(read_conditions(model, collate(samples)).double())
        words = [str(sample.messages[-1]["content"][-1]["text"]).split() for sample in samples]
        colours += [next(place for place, colour in enumerate(COLOURS) if colour in each) for each in words]
    return read_off(torch.cat(read), torch.tensor(colours))


def read_off(states: Tensor, kinds: Tensor) -> float:
    """How often a linear map, by ridge regression on the first three quarters, tells the kind of the others.

    Args:
        states: (N, D) float64.
        kinds: (N,) int64.
    """
    known = 3 * len(states) // 4
    scaled = (states - states[:known].mean(dim=0)) / (states[:known].std(dim=0) + 1e-6)
    scaled = torch.cat([scaled, torch.ones(len(scaled), 1, dtype=scaled.dtype)], dim=1)
    wanted = torch.nn.functional.one_hot(kinds[:known]).double()
    gram = scaled[:known].T @ scaled[:known] + 10 * torch.eye(scaled.shape[1], dtype=scaled.dtype)
    guessed = (scaled[known:] @ torch.linalg.solve(gram, scaled[:known].T @ wanted)).argmax(dim=1)
    return float((guessed == kinds[known:]).double().mean())


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
    return {"conditions": _told(read_conditions(model, inputs), told)}


def _told(conditions: Tensor, told: str) -> Tensor:
    if told == "own":
        return conditions
    return conditions.roll(1, dims=0) if told == "others" else torch.zeros_like(conditions)
