"""What is measured of a model: masks beside each other, answers under them, tasks that share one, healing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alula.compress import (
    Batches,
    MixtureBatches,
    Pooled,
    WeightMask,
    WeightPruning,
    apply_mask,
    find_mask,
    pooled_mask,
    shared_mask,
    task_masks,
)
from alula.data import Collator, Mixture, open_source
from alula.evaluation import RunResult, evaluate
from alula.files import write_json
from alula.hosts import save_host
from alula.loading import load_model
from alula.probes import Overlap, Resampling, watch
from alula.seam import LayerView, Owner, Phase, Point, install
from alula.training import load_recipe, train
from alula_fledgling.tasks import native_tasks
from studies.alignment.measure import OVERLAPS, PAIR
from studies.passes import BATCH, held_out, look
from studies.policies.measure import packed
from studies.subnetwork.plan import CALIBRATIONS, HEALINGS, LOOKED, RULES, TASKS, SubnetworkPlan

SKILLS = {"text": "text_bare", "visual": "visual"}
"""by skill, the task that asks for it"""
PADDED = 128
"""rows to which the published code fills each sample with zeros, which all tokens see and which count as tokens"""
_RECIPE = Path(__file__).parents[2] / "recipes" / "heal.yaml"
_CALIBRATED = {"image": ("image", ("visual",)), "words": ("text", ("text",)), "both": ("all", ("visual", "text"))}
"""by what a mask is found: whose tokens, of which streams"""
STEPS = 100
"""of a healing, half of the recipe's"""
_OTHERS = 1
"""seed of other samples"""


def measure(plan: SubnetworkPlan, seed: int) -> None:
    """Measure a seed's model; what was measured before is left as it is."""
    for path, job in Measuring(plan, seed).jobs():
        if not path.is_file():
            write_json(path, job())


def measurements(plan: SubnetworkPlan, seed: int) -> list[Path]:
    """The files that `measure` writes."""
    return [path for path, _ in Measuring(plan, seed).jobs()]


@dataclass(frozen=True)
class Measuring:
    """What is measured of one seed's model, and how."""

    plan: SubnetworkPlan
    seed: int

    def jobs(self) -> list[tuple[Path, Callable[[], dict[str, Any]]]]:
        """File by file, what makes it."""
        directory = self.plan.measured(self.seed)
        found: dict[str, Callable[[], dict[str, Any]]] = {"none": self.untouched, "overlap": self.overlap}
        for sparsity in self.plan.sparsities:
            for name in CALIBRATIONS:
                found[f"pruned/{name}-{100 * sparsity:g}"] = partial(self.pruned, name, sparsity)
        for rule in RULES:
            found[f"shared/{rule}"] = partial(self.shared, rule)
        for name in HEALINGS:
            found[f"healed/{name}"] = partial(self.healed, name)
        return [(directory / f"{name}.json", job) for name, job in found.items()]

    # -- the model and what it is shown -------------------------------------------------------------------------------

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Mapping[str, Tensor]]:
        model, processor = load_model(self.plan.model(self.seed))
        return model, processor, {name: value.clone() for name, value in model.state_dict().items()}

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def processor(self) -> Any:
        return self._loaded[1]

    @contextmanager
    def _without(self, mask: WeightMask) -> Iterator[Any]:
        """The model without what a mask does not keep, inside."""
        model, _, state = self._loaded
        try:
            apply_mask(model, mask)
            yield model
        finally:
            model.load_state_dict(state)

    @cached_property
    def _made(self) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
        return {}

    def _batches(self, stream: str, seed: int = 0) -> Batches:
        """Samples that no question is among; made once, since every layer goes through them."""
        if (stream, seed) not in self._made:
            source = open_source({"microworld": stream, "split": "train", "seed": 71 + seed})
            collate = Collator(self.processor, labels=False)
            many = MixtureBatches(Mixture([source], seed=seed), collate, samples=self.plan.samples, batch_size=32)
            self._made[stream, seed] = [*many]
        return self._made[stream, seed]

    @cached_property
    def _padded(self) -> list[dict[str, Tensor]]:
        """What masks of both are found on, with the defect of the published code."""
        return padded(self.model, Pooled({stream: self._batches(stream) for stream in _CALIBRATED["both"][1]}))

    def answers(self, model: Any) -> dict[str, str]:
        """Packed by skill: which questions are answered right."""
        names = [*SKILLS.values()]
        tasks = native_tasks(names, n=self.plan.items, seed=self.plan.task_seed)
        run: RunResult = evaluate(model, self.processor, tasks, batch_size=BATCH)
        return {skill: packed([item.score >= 1 for item in run.tasks[task].items]) for skill, task in SKILLS.items()}

    # -- masks --------------------------------------------------------------------------------------------------------

    def mask(self, name: str, sparsity: float, seed: int = 0) -> WeightMask:
        """A mask by what it is found by; `seed` draws other samples."""
        if name == "random":
            shapes = self.mask("magnitude", sparsity).shapes
            return WeightMask.random(shapes, sparsity, seed=self.seed)
        if name == "magnitude":
            return find_mask(self.model, WeightPruning(method="magnitude", sparsity=sparsity, per="output"))
        tokens, streams = _CALIBRATED["both" if name == "padded" else name]
        batches: Batches = Pooled({stream: self._batches(stream, seed) for stream in streams})
        if name == "padded":
            batches = self._padded
        return find_mask(self.model, WeightPruning(sparsity=sparsity, tokens=tokens), batches)

    @cached_property
    def _tasks(self) -> tuple[dict[str, Batches], dict[str, WeightMask]]:
        tasks = {stream: self._batches(stream) for stream in TASKS}
        return tasks, task_masks(self.model, WeightPruning(sparsity=LOOKED), tasks)

    # -- measurements -------------------------------------------------------------------------------------------------

    def untouched(self) -> dict[str, Any]:
        """Answers of the model as it is."""
        return self.answers(self.model)

    def pruned(self, name: str, sparsity: float) -> dict[str, Any]:
        """Answers under a mask."""
        mask = self.mask(name, sparsity)
        with self._without(mask) as model:
            return {"sparsity": mask.sparsity, **self.answers(model)}

    def overlap(self) -> dict[str, Any]:
        """How much masks share: by layer of one prompt's image and text tokens, with what can be expected; and of masks
        as they are applied."""
        probe = Overlap(streams=("image", "text"), sparsity=LOOKED)
        with watch(self.model, [probe]):
            look(self.model, Collator(self.processor), held_out("visual", self.plan.samples, self.plan.task_seed))
        layers = probe.result(Resampling(seed=self.plan.task_seed)).pairs[PAIR].layers
        masks = {name: self.mask(name, LOOKED) for name in ("image", "words", "both", "padded", "magnitude")}
        others = {name: self.mask(name, LOOKED, _OTHERS) for name in ("image", "words")}
        pairs = {
            "image, words": (masks["image"], masks["words"]),
            "image, other samples": (masks["image"], others["image"]),
            "words, other samples": (masks["words"], others["words"]),
            "image, magnitude": (masks["image"], masks["magnitude"]),
            "words, magnitude": (masks["words"], masks["magnitude"]),
            "both, padded": (masks["both"], masks["padded"]),
        }
        found: dict[str, Any] = {
            "layers": {name: [getattr(layer, name) for layer in layers] for name in (*OVERLAPS, "beyond_magnitude")},
            "pairs": {name: _mean(one.iou(other)) for name, (one, other) in pairs.items()},
            "chance": _mean(masks["image"].iou_by_chance(masks["words"])),
            "changed by padding": (masks["both"] ^ masks["padded"]).density,
        }
        return found

    def shared(self, rule: str) -> dict[str, Any]:
        """Answers under one mask for all tasks."""
        tasks, masks = self._tasks
        subnet = shared_mask(masks)
        settings = WeightPruning(sparsity=LOOKED)
        if rule == "pooled":
            mask = pooled_mask(self.model, settings, tasks, subnet)
        elif rule == "magnitude":
            mask = find_mask(self.model, WeightPruning(method="magnitude"), like=subnet)
        elif rule == "random":
            mask = WeightMask.random(subnet.shapes, subnet.sparsity, seed=self.seed)
        else:
            mask = subnet if rule == "intersection" else shared_mask(masks, rule)  # type: ignore[arg-type]
        with self._without(mask) as model:
            return {"sparsity": mask.sparsity, **self.answers(model)}

    def healed(self, name: str) -> dict[str, Any]:
        """Answers after a short LoRA on a pruned model: with the adapter beside it, and merged under the mask again."""
        mask, run = self.mask("both", self.plan.healed), self.plan.own.run_directory(self.seed, f"healed-{name}")
        host = run.parent / f"{run.name}-host"
        with self._without(mask) as model:
            save_host((model, self.processor), host)
        steps = max(1, round(STEPS * self.plan.steps))
        changes = [f"host.path={host}", f"output_dir={run}", f"seed={self.seed}", f"stages.heal.steps={steps}"]
        if name == "visual":
            changes.append("stages.heal.data.text_replay=null")
        result = train(load_recipe(_RECIPE, changes), quiet=True)
        tuned = load_model(result.final).model
        beside = self.answers(tuned)
        merged = tuned.merge_and_unload()
        apply_mask(merged, mask, check_model=False)
        return {"sparsity": mask.sparsity, "beside": beside, "merged": self.answers(merged)}


def padded(model: Any, batches: Batches) -> list[dict[str, Tensor]]:
    """Batches as the published code makes them of others: what enters the first layer, filled up with rows of zeros to
    `PADDED`, which every token sees and which count as tokens (pruning/wanda_mm.py of mshukor/ima-lmms, 129-149)."""
    seen: list[Tensor] = []
    found = []

    def read(view: LayerView, hidden: Tensor) -> None:
        seen.append(hidden.detach().clone())

    seam = install(model, "entering", Owner())
    handle = seam.on(Point.BLOCK_INPUT, 0, read, phase=Phase.READ, owner="entering")
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False)
                rows, there = seen.pop(), batch["attention_mask"].bool()
                whole = rows.new_zeros(len(rows), max(PADDED, there.shape[1]), rows.shape[-1])
                for sample, (own, real) in enumerate(zip(rows, there, strict=True)):
                    whole[sample, : int(real.sum())] = own[real]
                ones = torch.ones(whole.shape[:2], dtype=torch.int64)
                kinds = torch.zeros_like(ones)
                found.append({"inputs_embeds": whole, "attention_mask": ones, "mm_token_type_ids": kinds})
    finally:
        handle.remove()
        seam.release("entering")
    return found


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
