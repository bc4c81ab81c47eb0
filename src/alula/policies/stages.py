"""Places for perceptual tokens that get fewer from stage to stage, and a criterion that says who has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alula.errors import UsageError
from alula.policies.base import Stand
from alula.policies.criteria import Candidates, Criterion, Group, Layout, Per, Scene
from alula.seam import LayerView, Point, Work

Wanted = Callable[[int, Sequence[Group]], Sequence[int]]
"""given a stage and the groups of a forward, how many tokens of each stay"""


@dataclass(frozen=True, eq=False)
class _Chosen:
    """What a stage left in one forward.

    Attributes:
        work: of the tokens that are left, and of text.
        before: the candidates there were.
        stays: (U, N) bool which of them are left.
    """

    work: Work
    before: Candidates
    stays: Tensor


class Stages:
    """What one block under a policy asks of the seam; what was chosen in a forward is the forward's."""

    def __init__(self, criterion: Criterion, layers: Sequence[int], wanted: Wanted, per: Per, owner: str) -> None:
        """
        Args:
            criterion: says who stays.
            layers: of the stages, ascending: the first that the tokens which leave are not in.
            wanted: says how many stay.
            per: among whom they are chosen.
            owner: name under which the policy has the seam.
        """
        self.criterion, self.layers, self.wanted, self.owner = criterion, layers, wanted, owner
        self.per: Per = "image" if criterion.is_of_images else per

    def place(self, stand: Stand) -> None:
        """Put them on a host.

        Raises:
            UsageError: a stage is outside of its decoder.
        """
        first, count = int(self.criterion.reads_before), stand.anatomy.num_layers
        for layer in self.layers:
            if not first <= layer < count:
                reads = "attention is read in the layer before it, and " if first else ""
                raise UsageError(
                    f"stage at layer {layer}: {reads}tokens leave it and those behind",
                    where="layers",
                    remedy=f"give layers of {first} to {count - 1}",
                )
            self.criterion.place(stand, layer)
            if self.criterion.merges:
                stand.at(Point.BLOCK_INPUT, layer, self._merge)
        for layer in range(self.layers[0], count):
            stand.work(layer, self)

    def work(self, view: LayerView, hidden: Tensor) -> Work | None:
        """That of the tokens left by the last stage before this layer."""
        if not view.ctx.new_media:
            return None
        chosen = self._chosen(sum(layer <= view.layer for layer in self.layers) - 1, view, hidden)
        return None if chosen is None else chosen.work

    @torch.compiler.disable  # it reads the device
    def _merge(self, view: LayerView, hidden: Tensor) -> Tensor | None:
        if not view.ctx.new_media:
            return None
        chosen = self._chosen(self.layers.index(view.layer), view, hidden)
        if chosen is None:
            return None
        # again from what the layer is given: gradients flow through what is merged, also through a recomputed layer
        return self.criterion.merge(Scene(view, hidden, self.owner), chosen.before, chosen.stays)

    def _chosen(self, stage: int, view: LayerView, hidden: Tensor) -> _Chosen | None:
        """What a stage leaves in this forward, chosen when it is first asked for; None where nobody competes."""
        memo = view.ctx.memo
        if (self.owner, stage) not in memo:
            with torch.no_grad():
                memo[self.owner, stage] = self._choose(stage, view, hidden.detach())
        return memo[self.owner, stage]

    def _choose(self, stage: int, view: LayerView, hidden: Tensor) -> _Chosen | None:
        if not stage:
            there = Candidates.of(view.ctx.tokens, view.ctx.once(Layout.of, view.ctx.tokens), per=self.per)
        else:
            last: _Chosen | None = view.ctx.memo[self.owner, stage - 1]
            if last is None:
                return None
            there = last.before.only(last.stays)
        if not there.groups:
            return None
        there = there.wanting(tuple(self.wanted(stage, there.groups)))
        stays = self.criterion.choose(Scene(view, hidden, self.owner), there)
        work = Work.of(there.spread(stays) | ~view.ctx.tokens.is_perceptual)
        view.ctx.memo[self.owner, "left"] = work
        return _Chosen(work, there, stays)
