"""One mask for several tasks, what it is held against, and data out of a mixture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alula.compress import (
    MixtureBatches,
    WeightPruning,
    find_mask,
    pooled_mask,
    prune,
    shared_mask,
    task_masks,
)
from alula.data import Mixture
from alula.data.collate import Collator
from alula.data.samples import Sample
from alula.errors import UsageError
from tests import zoo
from tests.compress.common import same, samples, state
from tests.hosts import tiny

HALF = WeightPruning(sparsity=0.5)


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[Any]]:
    given = samples("llava-llama")
    return {"one": given[:1], "two": given[1:2], "three": given[2:]}


def test_the_shared_subnetwork(tasks: dict[str, list[Any]]) -> None:
    model = zoo.build("llava-llama")
    before = state(model)
    masks = task_masks(model, HALF, tasks)
    assert same(before, state(model))
    for task, mask in masks.items():
        assert (mask ^ find_mask(model, HALF, tasks[task])).density == 0
    every, most, some = (shared_mask(masks, rule) for rule in ("intersection", "majority", "union"))
    for name in every.shapes:
        votes = torch.stack([mask.unpack(name).int() for mask in masks.values()]).sum(dim=0)
        for shared, least in ((every, 3), (most, 2), (some, 1)):
            assert torch.equal(shared.unpack(name), votes >= least)
    assert every.sparsity > 0.5 > some.sparsity  # the effective one is not the one asked for
    assert every.made["sparsity"] == pytest.approx(every.sparsity, abs=1e-6)
    assert every.made["sparsity_of_tasks"] == dict.fromkeys(tasks, 0.5)
    assert every.made["tasks"]["two"]["data"]["samples"] == 1
    pooled = pooled_mask(model, HALF, tasks, every)
    assert {name: pooled.count(name) for name in every.shapes} == {name: every.count(name) for name in every.shapes}
    assert pooled.made["data"]["samples"] == 4
    assert (pooled ^ every).density > 0


def test_the_rival_compares_what_the_tasks_compared(tasks: dict[str, list[Any]]) -> None:
    """Weights of the whole matrix, not output by output: the best of it, however they spread over its rows."""
    model, settings = zoo.build("llava-llama"), WeightPruning(sparsity=0.5, per="matrix")
    shared = shared_mask(task_masks(model, settings, tasks))
    pooled = pooled_mask(model, settings, tasks, shared)
    assert {name: pooled.count(name) for name in shared.shapes} == {name: shared.count(name) for name in shared.shapes}
    once = shared_mask({"one": find_mask(model, settings, samples("llava-llama")), "same": pooled}, "union")
    for name in list(shared.shapes)[:7]:  # of the first layer, which no pruned one is before: all that stays, ranked
        assert once.count(name) == pooled.shapes[name][0] * pooled.shapes[name][1] // 2


def test_errors_say_of_which_task(tasks: dict[str, list[Any]]) -> None:
    with pytest.raises(UsageError, match=r"^task 'two': none of the 1 calibration samples"):
        task_masks(zoo.build("llava-llama"), WeightPruning(sparsity=0.5, tokens="image"), {
            "one": tasks["one"], "two": samples("llava-llama")[3:]
        })  # fmt: skip


def test_what_is_shared_by_none() -> None:
    model, given = zoo.build("llama"), samples("llama")
    mask = find_mask(model, HALF, given)
    with pytest.raises(UsageError, match="1 masks share nothing"):
        shared_mask({"one": mask})
    with pytest.raises(UsageError, match="of 2 models"):
        shared_mask({"one": mask, "two": find_mask(zoo.build("llama", seed=1), HALF, given)})
    with pytest.raises(UsageError, match="no rule 'both'"):
        shared_mask({"one": mask, "two": mask}, "both")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="same mask for every task"):
        task_masks(model, WeightPruning(method="magnitude", sparsity=0.5), {"one": given, "two": given})


class Talk:
    name, size = "talk", 5

    def __getitem__(self, index: int) -> Sample:
        turns = [("user", f"how many {index}?"), ("assistant", "two words" * (index + 1))]
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        return Sample(id=f"talk-{index}", messages=messages)


def test_data_of_a_mixture() -> None:
    """The same samples in every pass, whatever their batches."""
    collate = Collator(tiny.tokenizer(), labels=False, roles=True)
    mixture: Any = Mixture([Talk()])  # type: ignore[list-item]
    masks = []
    for size in (1, 3, 8):
        model = tiny.decoder("llama").double()
        batches = MixtureBatches(mixture, collate, samples=7, batch_size=size)
        mask = prune(model, WeightPruning(sparsity=0.5, tokens="assistant"), batches)
        assert mask.made["data"]["samples"] == 7
        masks.append(mask)
    assert [(masks[0] ^ mask).density for mask in masks] == [0, 0, 0]
    whole = find_mask(tiny.decoder("llama"), HALF, MixtureBatches(mixture, collate, samples=7))
    assert whole.made["data"]["tokens"] > masks[0].made["data"]["tokens"]
    with pytest.raises(UsageError, match="at least 1"):
        MixtureBatches(mixture, collate, samples=0)
