"""Places for perceptual tokens that get fewer from stage to stage, and a criterion that says who has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alula.errors import UsageError
from alula.policies.base import Stand
from alula.policies.criteria import Candidates, Criterion, Group, Layout, Merge, Per, Scene, Scored
from alula.policies.endings import check_endings
from alula.seam import LayerView, Point, Work

Wanted = Callable[[int, Sequence[Group]], Sequence[int] | None]
"""given a stage and the groups of a forward, how many tokens of each stay; None: as many as stand above the knee of the
curve of their scores"""


@dataclass(frozen=True, eq=False)
class _Chosen:
    """What a stage left in one forward.

    Attributes:
        work: of the tokens that are left, and of text.
        before: the candidates there were.
        stays: (U, N) bool which of them are left.
        into: (U, N) whom each of them joins; None: those that leave are gone.
    """

    work: Work
    before: Candidates
    stays: Tensor
    into: Tensor | None


class Stages:
    """What one block under a policy asks of the seam; what was chosen in a forward is the forward's."""

    def __init__(
        self, stages: Sequence[tuple[int, Criterion]], wanted: Wanted, per: Per, owner: str, merge: Merge | None = None
    ) -> None:
        """
        Args:
            stages: ascending: the first layer that the tokens which leave are not in, and who says which these are.
            wanted: says how many stay.
            per: among whom they are chosen.
            owner: name under which the policy has the seam.
            merge: what becomes of those that leave.
        """
        self.layers, self.criteria = [layer for layer, _ in stages], [criterion for _, criterion in stages]
        self.wanted, self.owner, self.merge = wanted, owner, merge
        self.per: Per = "image" if any(each.is_of_images for each in self.criteria) else per

    def place(self, stand: Stand) -> None:
        """Put them on a host.

        Raises:
            UsageError: a stage is outside of its decoder.
        """
        count = stand.anatomy.num_layers
        for layer, criterion in zip(self.layers, self.criteria, strict=True):
            first = int(criterion.reads_before)
            if not first <= layer < count:
                reads = "attention is read in the layer before it, and " if first else ""
                raise UsageError(
                    f"stage at layer {layer}: {reads}tokens leave it and those behind",
                    where="layers",
                    remedy=f"give layers of {first} to {count - 1}",
                )
            criterion.place(stand, layer)
            if criterion.merges or self.merge is not None:
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
        if chosen is None or chosen.into is None:
            return None
        # gradients flow through what is merged, also where the layer is computed again
        if self.merge is None:
            return chosen.before.merged(hidden, chosen.into)
        return self.merge.merged(hidden, chosen.before, chosen.into)

    def _chosen(self, stage: int, view: LayerView, hidden: Tensor) -> _Chosen | None:
        """What a stage leaves in this forward, chosen when it is first asked for; None where nobody competes."""
        memo = view.ctx.memo
        if (self.owner, stage) not in memo:
            with torch.no_grad():
                memo[self.owner, stage] = self._choose(stage, view, hidden.detach())
        return memo[self.owner, stage]

    def _choose(self, stage: int, view: LayerView, hidden: Tensor) -> _Chosen | None:
        if not stage:
            tokens, is_of_images = view.ctx.tokens, any(each.is_of_images for each in self.criteria)
            shapes = view.ctx.shapes if is_of_images else None
            there = Candidates.of(tokens, view.ctx.once(Layout.of, tokens), per=self.per, shapes=shapes)
        else:
            last: _Chosen | None = view.ctx.memo[self.owner, stage - 1]
            if last is None:
                return None
            there = last.before.only(last.stays)
        if not there.groups:
            return None
        wanted = self.wanted(stage, there.groups)
        there = there.wanting(there.counts if wanted is None else tuple(wanted))
        criterion, scene = self.criteria[stage], Scene(view, hidden, self.owner)
        into = None
        if wanted is None and isinstance(criterion, Scored):
            stays = criterion.choose_to_knee(scene, there)
        elif self.merge is not None:
            stays, into = self.merge.choose(criterion, scene, there)
        else:
            stays = criterion.choose(scene, there)
            into = criterion.into(there) if criterion.merges else None
        left = there.spread(stays) | ~view.ctx.tokens.is_perceptual
        work = Work.of(left)
        view.ctx.memo[self.owner, "left"] = work
        if view.ctx.labels is not None or view.ctx.once(Layout.of, view.ctx.tokens).ends_in_image:
            check_endings(view.ctx, ~left)
        return _Chosen(work, there, stays, into)
