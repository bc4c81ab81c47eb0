"""Places for perceptual tokens that get fewer from stage to stage, and a criterion that says who has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alula.errors import HostError, UsageError
from alula.policies.base import Stand
from alula.policies.criteria import Candidates, Criterion, Group, Layout, Merge, Per, Scene, Scored
from alula.policies.endings import check_endings
from alula.seam import ForwardContext, LayerView, Point, Work

Positions = Literal["keep", "dense"]
"""of tokens that are left: as they were, with gaps, or counted anew"""
Wanted = Callable[[int, Sequence[Group]], Sequence[int] | None]
"""given a stage and the groups of a forward, how many tokens of each stay; None: as many as stand above the knee of the
curve of their scores"""


@dataclass(frozen=True, eq=False)
class _Chosen:
    """What a stage left in one forward.

    Attributes:
        left: (B, S) bool of all new tokens: it is left, or text.
        work: that of these.
        before: the candidates there were.
        stays: (U, N) bool which of them are left.
        into: (U, N) whom each of them joins; None: those that leave are gone.
    """

    left: Tensor
    work: Work
    before: Candidates
    stays: Tensor
    into: Tensor | None


class Stages:
    """What one block under a policy asks of the seam; what was chosen in a forward is the forward's."""

    def __init__(
        self,
        stages: Sequence[tuple[int, Criterion]],
        wanted: Wanted,
        per: Per,
        owner: str,
        merge: Merge | None = None,
        positions: Positions = "keep",
    ) -> None:
        """
        Args:
            stages: ascending: the first layer that the tokens which leave are not in, and who says which these are.
            wanted: says how many stay.
            per: among whom they are chosen.
            owner: name under which the policy has the seam.
            merge: what becomes of those that leave.
            positions: of those that are left, and of text.
        """
        self.layers, self.criteria = [layer for layer, _ in stages], [criterion for _, criterion in stages]
        self.wanted, self.owner, self.merge, self.is_dense = wanted, owner, merge, positions == "dense"
        self.per: Per = "image" if any(each.is_of_images for each in self.criteria) else per

    def place(self, stand: Stand) -> None:
        """Put them on a host.

        Raises:
            UsageError: a stage is outside of its decoder. HostError: its positions cannot be counted anew.
        """
        count = stand.anatomy.num_layers
        if self.is_dense:
            stand.anatomy.check_rope()
            if stand.anatomy.has_planes:
                raise HostError(
                    "images of this host have positions by height and width, which are lost where tokens are counted",
                    where="positions",
                    remedy='give positions="keep"',
                )
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
        ctx = view.ctx
        if self.rests(ctx):
            return None
        stage = sum(layer <= view.layer for layer in self.layers) - 1
        chosen = self._chosen(stage, view, hidden) if ctx.new_media else None
        if not (self.is_dense and ctx.any_media):
            return None if chosen is None else chosen.work
        if (self.owner, stage, "dense") not in ctx.memo:
            left = None if chosen is None else chosen.left
            counts = None if chosen is None else chosen.work.counts
            work = Work(left, left, positions=self._counted(ctx, stage, left), counts=counts)
            ctx.memo[self.owner, stage, "dense"] = ctx.memo[self.owner, "left"] = work
        return ctx.memo[self.owner, stage, "dense"]

    def rests(self, ctx: ForwardContext) -> bool:
        """Whether no new token leaves, and none is counted anew."""
        return not (ctx.new_media or (self.is_dense and ctx.any_media))

    def _counted(self, ctx: ForwardContext, stage: int, left: Tensor | None) -> Tensor:
        """(B, S) how many tokens that are left stand before each new one in its sample.

        Raises:
            HostError: a window let go of some, and how many it was is not known.
        """
        last = self.layers[stage + 1] if stage + 1 < len(self.layers) else ctx.anatomy.num_layers
        before = ctx.held(range(self.layers[stage], last))
        if before is None:
            raise HostError(
                f"decoder layers {self.layers[stage]} to {last - 1} keep the keys of a window alone, and how many "
                "tokens stand before it is not known",
                where="positions",
                remedy='give positions="keep"',
            )
        stays = ctx.tokens.valid if left is None else left & ctx.tokens.valid
        return (before + stays.cumsum(dim=1) - 1).clamp(min=0)

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
        layout = view.ctx.once(Layout.of, view.ctx.tokens)
        work = Work.of(left, None if wanted is None else there.counted(layout.text_counts))
        view.ctx.memo[self.owner, "left"] = work
        if view.ctx.labels is not None or layout.ends_in_image:
            check_endings(view.ctx, ~left.cpu().numpy())
        return _Chosen(left, work, there, stays, into)
