"""What is measured of each model: alignment and its controls, geometry, overlap, skill, hallucination."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, SiglipVisionModel

import alula_fledgling as fledgling
from alula.data import Collator, Sample
from alula.evaluation import evaluate
from alula.files import atomic_directory, write_json
from alula.hosts import Host, load_host
from alula.hosts.quiet import quiet_loading
from alula.probes import Alignment, Geometry, Overlap, Resampling, noise_prompt, watch
from alula.training.layout import RunDirectory
from alula_fledgling.tasks import chair, native_tasks, pope
from studies.alignment.plan import AlignmentPlan, Run
from studies.passes import BATCH, held_out, look
from studies.population import measurement, train_measured

PAIR = "image-text"
SITES = ("stream", "attention_norm", "attention", "mlp_norm", "mlp")
OVERLAPS = ("iou", "chance", "shared_magnitude", "ceiling")
BEFORE = 0
"""the step at which a run's connector is untrained"""
_HOW = Resampling(resamples=1, permutations=1)  # intervals and p values come from the trainings, not from one's samples


def save_untrained_tower(plan: AlignmentPlan) -> None:
    """Write a tower of the fledgling's shape with random weights, the same for all training seeds."""
    if plan.untrained_tower.is_dir():
        return
    source = fledgling.directory() / "vision"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.task_seed)
        tower = SiglipVisionModel(AutoConfig.from_pretrained(source))
    with atomic_directory(plan.untrained_tower) as partial, quiet_loading():
        tower.save_pretrained(partial)
        AutoImageProcessor.from_pretrained(source, backend="pil").save_pretrained(partial)


def train_run(plan: AlignmentPlan, run: Run) -> None:
    """Train one run; measure it at its milestones, and as it was before."""
    recipe = plan.recipe_of(run)
    measure = _Measure(plan, RunDirectory(Path(recipe.output_dir)).host)
    train_measured(recipe, plan.milestones, plan.measurements(run), measure)
    before = measurement(plan.measurements(run), BEFORE)
    if not before.is_file():
        write_json(before, measure(measure.start.model))


class _Measure:
    """Measures models of one run; what does not depend on the model is made once.

    Args:
        host: the directory of the run's start, which is there once its training has begun.
    """

    def __init__(self, plan: AlignmentPlan, host: Path) -> None:
        self.host = host
        self.samples = held_out("caption", plan.samples, plan.task_seed)
        self.tasks = [
            *native_tasks(["visual"], n=plan.items, seed=plan.task_seed),
            pope(n=plan.items, seed=plan.task_seed),
            chair(n=plan.items // 3, seed=plan.task_seed),
        ]

    @cached_property
    def start(self) -> Host:
        return load_host(self.host)

    @cached_property
    def collator(self) -> Collator:
        return Collator(self.start.processor)

    def __call__(self, model: Any) -> dict[str, Any]:
        answers = evaluate(model, self.start.processor, self.tasks, batch_size=BATCH)
        figures, curves = look_inside(model, self.collator, self.samples)
        figures["visual"] = answers.tasks["visual"].accuracy
        for task in ("pope", "chair"):
            for group, ratios in answers.tasks[task].figures.items():
                for name, ratio in ratios.items():
                    key = name if name.startswith(task) else f"{task}_{name}"
                    where = "" if group == "all" else f", {group}"
                    figures[key + where] = None if ratio is None else ratio.value
        return {"figures": figures, "curves": curves}


def look_inside(
    model: Any, collator: Collator, samples: list[Sample]
) -> tuple[dict[str, float | None], dict[str, list[float | None]]]:
    """Probe a model on captioned pictures: scores, and curves over states or layers."""
    alignment = Alignment(sites=SITES, keep=max(2, len(samples)))
    geometry, overlap = Geometry(keep=2), Overlap(streams=("image", "text"))
    with watch(model, [alignment, geometry, overlap]):
        look(model, collator, samples)
    noise = Alignment(keep=max(2, len(samples)))
    with noise_prompt(model), noise.on(model):
        look(model, collator, samples)
    found, null = alignment.result(_HOW).pairs[PAIR], noise.result(_HOW).pairs[PAIR]
    shape = geometry.result(_HOW).sites["stream"]
    shared = overlap.result(_HOW).pairs[PAIR].layers
    figures = {
        "score": found.score,
        "score_input_prompt": found.score_input_prompt,
        "contrast": found.contrast_score,
        "noise_score": null.score,
        "noise_contrast": null.contrast_score,
    }
    curves: dict[str, list[float]] = {
        "within_text": list(shape.kinds["text"].within),
        "within_image": list(shape.kinds["image"].within),
        "between": list(shape.between[PAIR]),
        "norm_text": [point.value for point in shape.kinds["text"].norms["median"]],
        "norm_image": [point.value for point in shape.kinds["image"].norms["median"]],
        "change_text": [point.value for point in shape.kinds["text"].change[1]],
        "change_image": [point.value for point in shape.kinds["image"].change[1]],
        **{name: [getattr(layer, name) for layer in shared] for name in OVERLAPS},
    }
    for site, measured in found.sites.items():
        curves[f"aligned/{site}"] = [point.value for point in measured.all_pairs]
        curves[f"contrast/{site}"] = [point.value for point in measured.centred_contrast]
    return (
        {name: None if estimate is None else _defined(estimate.value) for name, estimate in figures.items()},
        {name: [_defined(value) for value in values] for name, values in curves.items()},
    )


def _defined(value: float) -> float | None:
    return value if value == value else None
