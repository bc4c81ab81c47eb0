"""What is measured of each model: text answers, bare and after an image, and the attention shift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alula.data import Collator
from alula.evaluation import evaluate
from alula.files import write_json
from alula.loading import load_model
from alula.probes import AttentionShift, watch
from alula_fledgling.tasks import native_tasks
from studies.attention_shift.plan import Run, ShiftPlan
from studies.passes import BATCH, held_out, look
from studies.population import train_measured

TASKS = ("text_bare", "text_after_image", "visual")
SAMPLES = {"dialogue": ("dialogue", ["TV"]), "question": ("visual", None)}
"""Name -> microworld stream and families. "dialogue": a text turn, then a question about an image, so that there is
text on both sides; "question": the question about an image alone, before which stands only the header of the turn."""
QUERIES = ("all", "after")
"""whose attention counts: of all rows, as in the paper's Eq. 1, or of those that see every segment"""
CURVES = ("before", "image", "after")
PRIMARY = "dialogue, all"
"""chosen before any model was trained; the others show how much the choice matters"""


def train_run(plan: ShiftPlan, run: Run) -> None:
    """Train one run and measure it at its milestones."""
    _, processor = load_model(plan.aligned(run.seed))
    train_measured(plan.recipe_of(run), plan.milestones, plan.measurements(run), measurer(plan, processor))


def measure_base(plan: ShiftPlan, seed: int) -> None:
    """Measure the host that the runs of a seed start from."""
    path = plan.base_measurement(seed)
    if not path.is_file():
        model, processor = load_model(plan.aligned(seed))
        write_json(path, measurer(plan, processor)(model))


def measurer(plan: ShiftPlan, processor: Any) -> Callable[[Any], dict[str, Any]]:
    """What measures a model: accuracies by task, shifts by variant, and the curves behind the primary one."""
    tasks = native_tasks(TASKS, n=plan.items, seed=plan.task_seed)
    collator = Collator(processor)
    sets = {
        name: held_out(stream, plan.samples, plan.task_seed, families) for name, (stream, families) in SAMPLES.items()
    }

    def measure(model: Any) -> dict[str, Any]:
        answers = evaluate(model, processor, tasks, batch_size=BATCH)
        found: dict[str, Any] = {
            "accuracy": {name: task.accuracy for name, task in answers.tasks.items()},
            "shift": {},
        }
        for name, samples in sets.items():
            probes = {queries: AttentionShift(queries=queries, keep=max(2, plan.samples)) for queries in QUERIES}
            with watch(model, list(probes.values())):
                look(model, collator, samples)
            for queries, probe in probes.items():
                result = probe.result()
                variant = f"{name}, {queries}"
                found["shift"][variant] = result.shift["main"].to_dict()
                if variant == PRIMARY:
                    curves = result.curves["main"]
                    found["curves"] = {part: [point.value for point in curves[part]] for part in CURVES}
        return found

    return measure
