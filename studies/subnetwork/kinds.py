"""What is measured of a model that takes pictures, films, sounds and text: whose tokens use which weights, and what is
lost of each under one mask for all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from alula.compress import Batches, WeightMask, WeightPruning, find_mask, task_masks
from alula.data import Collator
from alula.evaluation.results import ItemResult
from alula.probes import Overlap, Resampling, watch
from studies.alignment.measure import OVERLAPS
from studies.passes import held_out, look
from studies.subnetwork.plan import KINDS, LOOKED, MATCHED, RULES, SubnetworkPlan
from studies.subnetwork.subject import OTHERS, Jobs, Subject, make, mean

_TOLD = (*OVERLAPS, "beyond_magnitude")


def measure_kinds(plan: SubnetworkPlan, seed: int) -> None:
    """Measure a seed's model; what was measured before is left as it is."""
    make(MeasuringKinds.of(plan, seed).jobs())


def kinds_measurements(plan: SubnetworkPlan, seed: int) -> list[Path]:
    """The files that `measure_kinds` writes."""
    return [path for path, _ in MeasuringKinds.of(plan, seed).jobs()]


class MeasuringKinds(Subject):
    """What is measured of the model of four kinds of one seed, and how."""

    @classmethod
    def of(cls, plan: SubnetworkPlan, seed: int) -> MeasuringKinds:
        return cls(plan, seed, plan.kinds_model(seed), KINDS)

    def jobs(self) -> Jobs:
        """File by file, what makes it."""
        found: dict[str, Callable[[], dict[str, Any]]] = {"none": self.untouched, "overlap": self.overlap}
        for name in KINDS:
            found[f"own/{name}"] = partial(self.own, name)
        for sparsity in sorted({*self.plan.sparsities, LOOKED}):
            for rule in RULES:
                if rule in MATCHED or sparsity == LOOKED:
                    found[f"shared/{rule}-{100 * sparsity:g}"] = partial(self.shared, rule, sparsity)
        return [(self.plan.measured(self.seed) / "kinds" / f"{name}.json", job) for name, job in found.items()]

    def untouched(self) -> dict[str, Any]:
        """Answers of the model as it is, and what guessing comes to."""
        run = self.run(self.model)
        return {
            "answers": self.marks(run),
            "guessed": {name: guessed(task.items) for name, task in zip(KINDS, run.tasks.values(), strict=True)},
        }

    # -- masks --------------------------------------------------------------------------------------------------------

    def mask(self, name: str, seed: int = 0) -> WeightMask:
        """That of the tokens of one kind; `seed` draws other samples."""
        kind = KINDS[name]
        batches = self.batches(kind.stream, seed, kind.families)
        return find_mask(self.model, WeightPruning(sparsity=LOOKED, tokens=name), batches)

    @cached_property
    def _prompts(self) -> dict[str, Batches]:
        return {name: self.batches(kind.stream, families=kind.families) for name, kind in KINDS.items()}

    def tasks(self, sparsity: float) -> dict[str, WeightMask]:
        """By kind the mask of its prompts, all tokens of them."""
        if sparsity not in self._found:
            self._found[sparsity] = task_masks(self.model, WeightPruning(sparsity=sparsity), self._prompts)
        return self._found[sparsity]

    @cached_property
    def _found(self) -> dict[float, dict[str, WeightMask]]:
        return {}

    # -- measurements -------------------------------------------------------------------------------------------------

    def overlap(self) -> dict[str, Any]:
        """How much masks of the tokens of kinds share: with what can be expected, and as they are applied."""
        probe, collator = Overlap(streams=tuple(KINDS), sparsity=LOOKED), Collator(self.processor)
        with watch(self.model, [probe]):
            for kind in KINDS.values():
                look(self.model, collator, held_out(kind.stream, self.plan.samples, self.plan.task_seed, kind.families))
        pairs = probe.result(Resampling(seed=self.plan.task_seed)).pairs
        masks = {name: self.mask(name) for name in KINDS}
        large = find_mask(self.model, WeightPruning(method="magnitude", sparsity=LOOKED, per="output"))
        found = {}
        for one, other in combinations(KINDS, 2):
            layers = pairs[f"{one}-{other}"].layers
            told = {name: float(np.mean([getattr(layer, name) for layer in layers])) for name in _TOLD}
            found[f"{one}, {other}"] = {"applied": mean(masks[one].iou(masks[other])), **told}
        return {
            "pairs": found,
            "others": {name: mean(mask.iou(self.mask(name, OTHERS))) for name, mask in masks.items()},
            "magnitude": {name: mean(mask.iou(large)) for name, mask in masks.items()},
        }

    def own(self, name: str) -> dict[str, Any]:
        """All questions, under the mask of one kind's prompts."""
        return self.answers_without(self.tasks(LOOKED)[name])

    def shared(self, rule: str, sparsity: float) -> dict[str, Any]:
        """All questions, under one mask for the four kinds."""
        return self.answers_without(self.by_rule(rule, sparsity, self._prompts, self.tasks(sparsity)))


def guessed(items: Sequence[ItemResult]) -> float:
    """Share right of who gives each family's commonest answer always."""
    golds = defaultdict(list)
    for item in items:
        golds[item.family].append(item.gold)
    return sum(Counter(each).most_common(1)[0][1] for each in golds.values()) / len(items)
