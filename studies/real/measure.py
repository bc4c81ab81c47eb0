"""One model of the study: what it still reads, what it sees, how far it has gone, what it is like inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch

from alula.data import Collator, Sample
from alula.files import write_json
from alula.hosts import Host
from alula.loading import load_model
from alula.policies import Skip
from alula.probes import Alignment, AttentionShift, Resampling, watch
from alula.training import train
from studies.alignment.measure import look_inside
from studies.frontier.divergence import divergences
from studies.passes import look
from studies.population import measurement, train_measured
from studies.real import words
from studies.real.arms import ARMS
from studies.real.data import write_own_words, write_questions
from studies.real.pictures import Held, captions, held_out, presences, swapped
from studies.real.plan import BASE, CAPTIONS, RealPlan

_HOW = Resampling(resamples=1, permutations=1)
PARTS: tuple[Literal["mlp", "attention", "block"], ...] = ("mlp", "attention", "block")


def align(plan: RealPlan, seed: int) -> None:
    """Train the connector every arm starts from; write what is trained on later."""
    if not plan.aligned(seed).is_dir():
        train(plan.align_recipe(seed), quiet=True)
    if not plan.questions.is_file():
        write_questions(plan.questions, [plan.data(name, "train") for name in CAPTIONS])
    if any(arm.replays for arm in plan.chosen) and not plan.replay(seed).is_file():
        model, processor = load_model(plan.aligned(seed))
        with computing(plan):
            write_own_words(plan.replay(seed), Host(model, processor), max(4, 5 * plan.items), seed)


def tune(plan: RealPlan, seed: int, name: str) -> None:
    """Train an arm, and measure it on its way."""
    if plan.model(seed, name).is_dir():
        return
    arm = next(each for each in ARMS if each.name == name)
    base, processor = load_model(plan.aligned(seed))

    def measure(model: Any) -> dict[str, Any]:
        return brief(plan, base, model, processor)

    train_measured(plan.recipe_of(seed, arm), plan.milestones, plan.on_the_way(seed, name), measure)


def measure(plan: RealPlan, seed: int, name: str) -> None:
    """Measure an arm's model, or the base, in full, unless that was done."""
    path = plan.measured(seed, name)
    if path.is_file():
        return
    base, processor = load_model(plan.aligned(seed))
    model = base if name == BASE else load_model(plan.model(seed, name)).model
    with computing(plan), torch.no_grad():
        write_json(path, full(plan, base, model, processor))
    if name == BASE:
        start = measurement(plan.on_the_way(seed, name), 0)
        with computing(plan):
            write_json(start, brief(plan, base, base, processor))


def full(plan: RealPlan, base: Any, model: Any, processor: Any) -> dict[str, Any]:
    """Everything that is measured of a model."""
    held = _held(plan)
    model.to(_device()), base.to(_device())
    return {
        "blimp": words.blimp(model, processor, words.read_blimp(plan.benchmarks, plan.items)),
        "coda": words.coda(model, processor, plan.benchmarks),
        "gsm8k": words.weigh_answers(model, processor, words.problems(plan.benchmarks, 3 * plan.items)),
        "formats": words.formats(model, processor),
        "captions": {
            **captions(model, processor, held.captions),
            **words.weigh_answers(model, processor, held.captions),
        },
        "presence": presences(model, processor, held.presence),
        "shapes": words.weigh_answers(model, processor, held.shapes),
        "divergence": _divergence(plan, base, model, processor),
        **_probes(plan, model, processor),
    }


def brief(plan: RealPlan, base: Any, model: Any, processor: Any) -> dict[str, Any]:
    """What is measured of a model in training: a quarter of what is asked in full."""
    held, quarter = _held(plan), max(2, plan.items // 4)
    with computing(plan), torch.no_grad():
        pairs = words.read_blimp(plan.benchmarks, quarter)
        return {
            "blimp": words.blimp(model, processor, pairs),
            "gsm8k": words.weigh_answers(model, processor, words.problems(plan.benchmarks, 3 * quarter)),
            "captions": words.weigh_answers(model, processor, _spread(held.captions, 4 * quarter)),
            "shapes": words.weigh_answers(model, processor, held.shapes[: 6 * quarter]),
            "divergence": _divergence(plan, base.to(_device()), model, processor),
            **_probes(plan, model, processor),
        }


def look_away(plan: RealPlan, seed: int, name: str) -> None:
    """What a model makes of answers and captions behind other pictures than their own."""
    path = plan.sight(seed, name)
    if path.is_file():
        return
    model, processor = load_model(plan.model(seed, name))
    model.to(_device())
    held = _held(plan)
    with computing(plan):
        found = {
            task: words.weigh_answers(model, processor, swapped(samples))["nats"]
            for task, samples in (("captions", held.captions), ("shapes", held.shapes))
        }
    write_json(path, found)


def look_in(plan: RealPlan, seed: int, name: str) -> None:
    """Alignment and its controls, geometry, overlap and curves of attention of a model, and what it answers where its
    layers skip image tokens."""
    path = plan.inside(seed, name)
    if path.is_file():
        return
    model, processor = load_model(plan.model(seed, name))
    model.to(_device())
    samples = _spread(_held(plan).captions, max(4, plan.items))
    with computing(plan), torch.no_grad():
        figures, curves = look_inside(model, Collator(processor), samples)
        shift = AttentionShift(keep=len(samples))
        with shift.on(model):
            look(model, Collator(processor), samples)
        attention = {part: [p.value for p in curve] for part, curve in shift.result(_HOW).curves["main"].items()}
        write_json(
            path,
            {"figures": figures, "curves": curves, "attention": attention, "skipped": _skipped(plan, model, processor)},
        )


def _skipped(plan: RealPlan, model: Any, processor: Any) -> dict[str, Any]:
    """Nats per token of answers to shapes and of captions where image tokens skip a part in every second layer behind
    the first quarter, as IMA has it."""
    held = _held(plan)
    asked = [*held.shapes[: 2 * plan.items], *_spread(held.captions, 2 * plan.items)]
    depth = int(getattr(model.config, "text_config", model.config).num_hidden_layers)
    layers = tuple(range(depth // 4, depth, 2))
    found = {"none": words.weigh_answers(model, processor, asked)}
    for part in PARTS:
        with Skip(part=part, layers=layers).on(model):
            found[part] = words.weigh_answers(model, processor, asked)
    return {"layers": list(layers), **found}


def _probes(plan: RealPlan, model: Any, processor: Any) -> dict[str, float | None]:
    """Attention shift, alignment, and alignment with a sample's own text beyond that with others'."""
    samples = _spread(_held(plan).captions, max(4, plan.items))
    shift, alignment = AttentionShift(keep=len(samples)), Alignment(keep=len(samples))
    with watch(model, [shift, alignment]):
        look(model, Collator(processor), samples)
    pair = alignment.result(_HOW).pairs["image-text"]
    found = {"shift": shift.result(_HOW).shift["main"], "alignment": pair.score, "contrast": pair.contrast_score}
    return {name: None if value is None or value.value != value.value else value.value for name, value in found.items()}


def _divergence(plan: RealPlan, base: Any, model: Any, processor: Any) -> list[float]:
    """KL(base || tuned) per sample of the new task: captions and shapes, half and half."""
    held = _held(plan)
    samples = [*_spread(held.captions, plan.items), *held.shapes[: plan.items]]
    return [round(value, 5) for value in divergences(base, model, processor, samples)]


def _spread(samples: list[Sample], count: int) -> list[Sample]:
    """So many, evenly spread."""
    return [samples[place * len(samples) // count] for place in range(min(count, len(samples)))]


@cache
def _held(plan: RealPlan) -> Held:
    return held_out(plan.real, plan.items)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def computing(plan: RealPlan) -> Iterator[None]:
    """Inside, models compute in the plan's precision."""
    with torch.autocast(_device(), torch.bfloat16, enabled=plan.precision == "bf16"):
        yield
