"""What is measured of a model: masks beside each other, answers under them, tasks that share one, healing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alula.compress import Batches, Pooled, WeightMask, WeightPruning, apply_mask, find_mask, task_masks
from alula.data import Collator
from alula.hosts import save_host
from alula.loading import load_model
from alula.probes import Overlap, Resampling, watch
from alula.seam import LayerView, Owner, Phase, Point, install
from alula.training import load_recipe, train
from studies.alignment.measure import OVERLAPS, PAIR
from studies.passes import held_out, look
from studies.subnetwork.plan import CALIBRATIONS, HEALINGS, KINDS, LOOKED, RECIPES, RULES, TASKS, SubnetworkPlan
from studies.subnetwork.subject import OTHERS, Jobs, Subject, make, mean

SKILLS = {"text": KINDS["text"], "visual": KINDS["image"]}
"""by skill, who asks for it"""
PADDED = 128
"""rows to which the published code fills each sample with zeros, which all tokens see and which count as tokens"""
_CALIBRATED = {"image": ("image", ("visual",)), "words": ("text", ("text",)), "both": ("all", ("visual", "text"))}
"""by what a mask is found: whose tokens, of which streams"""
STEPS = 100
"""of a healing, half of the recipe's"""


def measure(plan: SubnetworkPlan, seed: int) -> None:
    """Measure a seed's model; what was measured before is left as it is."""
    make(Measuring.of(plan, seed).jobs())


def measurements(plan: SubnetworkPlan, seed: int) -> list[Path]:
    """The files that `measure` writes."""
    return [path for path, _ in Measuring.of(plan, seed).jobs()]


class Measuring(Subject):
    """What is measured of the tuned model of one seed, and how."""

    @classmethod
    def of(cls, plan: SubnetworkPlan, seed: int) -> Measuring:
        return cls(plan, seed, plan.model(seed), SKILLS)

    def jobs(self) -> Jobs:
        """File by file, what makes it."""
        plan = self.plan
        found: dict[str, Callable[[], dict[str, Any]]] = {"none": self.untouched}
        if "masks" in plan.parts:
            found["overlap"] = self.overlap
            for sparsity in plan.sparsities:
                for name in CALIBRATIONS:
                    found[_pruned(name, sparsity)] = partial(self.pruned, name, sparsity)
            for rule in RULES:
                found[f"shared/{rule}"] = partial(self.shared, rule)
        if "healing" in plan.parts:
            found[_pruned("both", plan.healed)] = partial(self.pruned, "both", plan.healed)
            for name in HEALINGS:
                found[f"healed/{name}"] = partial(self.healed, name)
                found[f"trained/{name}"] = partial(self.trained, name)
        return [(plan.measured(self.seed) / f"{name}.json", job) for name, job in found.items()]

    # -- what it is shown ---------------------------------------------------------------------------------------------

    @cached_property
    def _padded(self) -> list[dict[str, Tensor]]:
        """What masks of both are found on, with the defect of the published code."""
        return padded(self.model, Pooled({stream: self.batches(stream) for stream in _CALIBRATED["both"][1]}))

    # -- masks --------------------------------------------------------------------------------------------------------

    def mask(self, name: str, sparsity: float, seed: int = 0) -> WeightMask:
        """A mask by what it is found by; `seed` draws other samples."""
        if name == "random":
            shapes = self.mask("magnitude", sparsity).shapes
            return WeightMask.random(shapes, sparsity, seed=self.seed)
        if name == "magnitude":
            return find_mask(self.model, WeightPruning(method="magnitude", sparsity=sparsity, per="output"))
        tokens, streams = _CALIBRATED["both" if name == "padded" else name]
        batches: Batches = Pooled({stream: self.batches(stream, seed) for stream in streams})
        if name == "padded":
            batches = self._padded
        return find_mask(self.model, WeightPruning(sparsity=sparsity, tokens=tokens), batches)

    @cached_property
    def _tasks(self) -> tuple[dict[str, Batches], dict[str, WeightMask]]:
        tasks = {stream: self.batches(stream) for stream in TASKS}
        return tasks, task_masks(self.model, WeightPruning(sparsity=LOOKED), tasks)

    # -- measurements -------------------------------------------------------------------------------------------------

    def untouched(self) -> dict[str, Any]:
        """Answers of the model as it is."""
        return self.answers(self.model)

    def pruned(self, name: str, sparsity: float) -> dict[str, Any]:
        """Answers under a mask."""
        return self.answers_without(self.mask(name, sparsity))

    def overlap(self) -> dict[str, Any]:
        """How much masks share: by layer of one prompt's image and text tokens, with what can be expected; and of masks
        as they are applied."""
        probe = Overlap(streams=("image", "text"), sparsity=LOOKED)
        with watch(self.model, [probe]):
            look(self.model, Collator(self.processor), held_out("visual", self.plan.samples, self.plan.task_seed))
        layers = probe.result(Resampling(seed=self.plan.task_seed)).pairs[PAIR].layers
        masks = {name: self.mask(name, LOOKED) for name in ("image", "words", "both", "padded", "magnitude")}
        others = {name: self.mask(name, LOOKED, OTHERS) for name in ("image", "words")}
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
            "pairs": {name: mean(one.iou(other)) for name, (one, other) in pairs.items()},
            "chance": mean(masks["image"].iou_by_chance(masks["words"])),
            "changed by padding": (masks["both"] ^ masks["padded"]).density,
        }
        return found

    def shared(self, rule: str) -> dict[str, Any]:
        """Answers under one mask for all tasks."""
        return self.answers_without(self.by_rule(rule, LOOKED, *self._tasks))

    def healed(self, name: str) -> dict[str, Any]:
        """Answers after a short LoRA on a pruned model: with the adapter beside it, and merged under the mask again."""
        mask = self.mask("both", self.plan.healed)
        tuned = self._lora(name, f"healed-{name}", mask)
        beside = self.answers(tuned)
        merged = tuned.merge_and_unload()
        apply_mask(merged, mask, check_model=False)
        return {"sparsity": mask.sparsity, "beside": beside, "merged": self.answers(merged)}

    def trained(self, name: str) -> dict[str, Any]:
        """Answers after the same LoRA on the model as it is: what of healing is training alone."""
        return self.answers(self._lora(name, f"trained-{name}", None))

    def _lora(self, name: str, directory: str, mask: WeightMask | None) -> Any:
        """The model, pruned where there is a mask, with the adapter of a short training beside it."""
        run = self.plan.own.run_directory(self.seed, directory)
        host = run.parent / f"{run.name}-host"
        with nullcontext(self.model) if mask is None else self.without(mask) as model:
            save_host((model, self.processor), host)
        steps = max(1, round(STEPS * self.plan.steps))
        changes = [f"host.path={host}", f"output_dir={run}", f"seed={self.seed}", f"stages.heal.steps={steps}"]
        if name == "visual":
            changes.append("stages.heal.data.text_replay=null")
        result = train(load_recipe(RECIPES / "heal.yaml", changes), quiet=True)
        return load_model(result.final).model


def _pruned(name: str, sparsity: float) -> str:
    return f"pruned/{name}-{100 * sparsity:g}"


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
