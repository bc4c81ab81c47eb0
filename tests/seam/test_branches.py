"""Branches of attention: published by whoever adds them, told to whoever subscribed."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import alula
from alula import WingsConfig
from alula.probes import AttentionShift
from alula.seam import Branch, BranchReader, LayerView, Phase, Point, Seam, install, marked
from tests import zoo
from tests.grafts.common import wake


class Reader(BranchReader):
    """Keeps the names of branches and their sums of ones."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, str]] = []
        self.sums: list[Tensor] = []

    def on_branch(self, view: LayerView, branch: Branch) -> None:
        self.seen.append((view.layer, branch.owner, branch.name))
        self.sums.append(branch.sums(torch.ones(*view.ctx.all_tokens.shape, 1)))


def uniform(seam: Seam, asked: list[int]) -> None:
    """Somebody who adds to every token what is attended to alike: all valid tokens, weight 0.5."""

    def add(view: LayerView, hidden: Tensor) -> Tensor | None:
        valid = view.ctx.all_tokens.valid

        def sums(values: Tensor) -> Tensor:
            asked.append(view.layer)
            mean = (values * valid[..., None]).sum(dim=1, keepdim=True) / valid.sum(dim=1)[:, None, None]
            return mean[:, :, None].expand(-1, view.ctx.tokens.shape[1], -1, -1)

        view.ctx.publish(view.layer, Branch("uniform", "all", hidden.new_tensor(0.5), sums))
        return None

    for layer in range(seam.anatomy.num_layers):
        seam.on(Point.ATTENTION, layer, add, phase=Phase.ADD, owner="uniform")


@pytest.mark.parametrize("learners", ["routed", "full"])
def test_attention_shift_adds_the_branches_of_anybody(learners: Any) -> None:
    model, batch, asked = zoo.build("llava-llama"), zoo.batch("llava-llama", "3I4", "2I5"), []
    uniform(install(model, "uniform"), asked)
    probe = AttentionShift(learners=learners)
    with torch.no_grad():
        model(**batch)
        assert not asked  # nobody wants to know
        with probe.on(model):
            model(**batch)
    assert asked == [0, 1]
    curves, weight = probe.result().curves, 0.5 if learners == "routed" else 1.0
    share = {
        "image": np.mean([4 / 11, 4 / 11]),
        "before": np.mean([3 / 11, 2 / 11]),
        "after": np.mean([4 / 11, 5 / 11]),
    }
    for segment, of_branch in share.items():
        for own, total in zip(curves["main"][segment], curves["total"][segment], strict=True):
            assert total.value == pytest.approx((own.value + weight * of_branch) / (1 + weight), abs=1e-6)


@pytest.mark.parametrize("router", ["mass", "constant"])
def test_learners_are_branches_of_their_graft(router: str) -> None:
    model, batch, reader = zoo.build("llava-llama"), zoo.batch("llava-llama", "3I4", "5"), Reader()
    graft = wake(alula.attach(model, WingsConfig(rank=4, router=router), name="mine"))
    with torch.no_grad():
        before = model(**batch).logits
        handles = [graft.seam.subscribe(layer, reader) for layer in range(2)]
        during = model(**batch).logits
        for handle in handles:
            handle.remove()
        model(**batch)
    assert torch.equal(before, during)
    assert sorted(reader.seen) == [(layer, "mine", name) for layer in range(2) for name in ("textual", "visual")]
    for sums in reader.sums:  # nothing before the image, nor in the sample without one
        torch.testing.assert_close(sums[0, 3:], torch.ones_like(sums[0, 3:]))
        assert not bool(sums[0, :3].any())
        assert not bool(sums[1].any())


def test_a_marked_subscriber_is_told_of_its_own_forwards() -> None:
    model, batch, reader = zoo.build("llava-llama"), zoo.batch("llava-llama", "3I4"), Reader()
    seam = install(model, "uniform")
    uniform(seam, [])
    handle = seam.subscribe(1, reader, mark="mine")
    with torch.no_grad():
        model(**batch)
        with marked("mine"):
            other = threading.Thread(target=lambda: model(**batch))
            other.start()
            other.join()
            assert not reader.seen
            model(**batch)
            assert reader.seen == [(1, "uniform", "all")]
            handle.remove()
            model(**batch)
    assert len(reader.seen) == 1
    assert not seam.requests.branches
