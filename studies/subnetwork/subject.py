"""A trained model that is pruned, asked, and left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from alula.compress import (
    Batches,
    MixtureBatches,
    WeightMask,
    WeightPruning,
    apply_mask,
    find_mask,
    pooled_mask,
    shared_mask,
)
from alula.data import Collator, Mixture, open_source
from alula.evaluation import RunResult, evaluate
from alula.files import write_json
from alula.loading import load_model
from studies.passes import BATCH
from studies.policies.measure import packed
from studies.subnetwork.plan import Kind, SubnetworkPlan

Jobs = list[tuple[Path, Callable[[], dict[str, Any]]]]
"""file by file, what makes it"""
OTHERS = 1
"""seed of other samples"""


@dataclass(frozen=True)
class Subject:
    """One model of a seed.

    Attributes:
        path: its directory.
        kinds: by skill, who asks for it and whose prompts show it.
    """

    plan: SubnetworkPlan
    seed: int
    path: Path
    kinds: Mapping[str, Kind]

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Mapping[str, Tensor]]:
        model, processor = load_model(self.path)
        return model, processor, {name: value.clone() for name, value in model.state_dict().items()}

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def processor(self) -> Any:
        return self._loaded[1]

    @contextmanager
    def without(self, mask: WeightMask) -> Iterator[Any]:
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

    def batches(self, stream: str, seed: int = 0, families: Sequence[str] | None = None) -> Batches:
        """Samples that no question is among; made once, since every layer goes through them."""
        if (stream, seed) not in self._made:
            chosen = {} if families is None else {"families": list(families)}
            source = open_source({"microworld": stream, "split": "train", "seed": 71 + seed, **chosen})
            collate = Collator(self.processor, labels=False)
            many = MixtureBatches(Mixture([source], seed=seed), collate, samples=self.plan.samples, batch_size=32)
            self._made[stream, seed] = [*many]
        return self._made[stream, seed]

    def run(self, model: Any) -> RunResult:
        """A model's answers to what is asked."""
        n, seed = self.plan.items, self.plan.task_seed
        tasks = [kind.task(n=n, seed=seed, families=kind.families) for kind in self.kinds.values()]
        return evaluate(model, self.processor, tasks, batch_size=BATCH)

    def answers(self, model: Any) -> dict[str, str]:
        """Packed by skill: which questions are answered right."""
        return self.marks(self.run(model))

    def marks(self, run: RunResult) -> dict[str, str]:
        """Packed by skill: which of these answers are right."""
        runs = zip(self.kinds, run.tasks.values(), strict=True)
        return {skill: packed([item.score >= 1 for item in task.items]) for skill, task in runs}

    def answers_without(self, mask: WeightMask) -> dict[str, Any]:
        """Answers under a mask, and how sparse it is."""
        with self.without(mask) as model:
            return {"sparsity": mask.sparsity, **self.answers(model)}

    def by_rule(
        self, rule: str, sparsity: float, tasks: Mapping[str, Batches], masks: Mapping[str, WeightMask]
    ) -> WeightMask:
        """One mask for all tasks, by a name of `RULES`; `masks` are those of the tasks."""
        if rule in ("majority", "union"):
            return shared_mask(masks, rule)  # type: ignore[arg-type]
        subnet = shared_mask(masks)
        if rule == "pooled":
            return pooled_mask(self.model, WeightPruning(sparsity=sparsity), tasks, subnet)
        if rule == "magnitude":
            return find_mask(self.model, WeightPruning(method="magnitude"), like=subnet)
        if rule == "random":
            return WeightMask.random(subnet.shapes, subnet.sparsity, seed=self.seed)
        return subnet


def make(jobs: Jobs) -> None:
    """Write what is missing; what was measured before is left as it is."""
    for path, job in jobs:
        if not path.is_file():
            write_json(path, job())


def mean(values: Mapping[str, float]) -> float:
    """Over matrices."""
    return sum(values.values()) / len(values)
