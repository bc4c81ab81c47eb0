"""Withdrawal of perceptual tokens: from one layer on, they are gone (VTW, arXiv 2405.05803)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from alula.anatomy import Anatomy
from alula.errors import UsageError
from alula.policies.base import Policy, Stand
from alula.policies.endings import check_endings
from alula.policies.registry import register
from alula.seam import ForwardContext, LayerView, Work
from alula.settings import Int


@register
class Withdraw(Policy):
    """The tokens of images, videos and sounds are in the first `layer` decoder layers and in none behind.

        with Withdraw(layer=16).on(model):
            model.generate(**inputs)

    VTW (arXiv 2405.05803). Which tokens leave is told by what they are, so several images, later turns, prompts that
    come in chunks and drafts are no special cases, and text alone keeps its bits.

    Attributes:
        layer: the first layer, counted from 0, that they are not in; as many layers see them. Larger than 0 and
            smaller than the number of layers: 0 is a model without images.
        positions: in these layers text has the positions that it has in the others, and what is gone leaves a gap
            ("keep"); or it is counted anew, without one ("dense"). Windows, and grafts that turn queries of their own,
            go by the positions of the other layers.
    """

    policy_type: ClassVar[str] = "withdraw"
    layer: Int
    positions: Literal["keep", "dense"] = "keep"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a decoder that cannot be had this way.

        Raises:
            UsageError: it has no such layer, or none before it. HostError: its positions cannot be counted anew.
        """
        count = anatomy.num_layers
        if self.layer < 0:
            raise UsageError(
                f"layers are counted from the first here, and {self.layer} is none of them",
                where="layer",
                remedy=f"give one of 1 to {count - 1}: {self.layer % count} is meant, if it was counted from the last",
            )
        if not 0 < self.layer < count:
            raise UsageError(
                f"withdrawal at layer {self.layer} leaves "
                f"{'every' if self.layer else 'no'} layer of this decoder with images",
                where="layer",
                remedy=f"give one of 1 to {count - 1}",
            )
        if self.positions == "dense":
            anatomy.check_rope()

    @property
    def concerns_text(self) -> bool:
        return False

    def place(self, stand: Stand) -> None:
        self.check(stand.anatomy)
        for layer in range(self.layer, stand.anatomy.num_layers):
            stand.work(layer, self)

    def work(self, view: LayerView, hidden: Tensor) -> Work | None:
        """That of text alone, where any new token is none.

        Raises:
            UsageError: see `check_endings`.
        """
        ctx = view.ctx
        if self.rests(ctx):
            return None
        is_counted = self.positions == "dense" and ctx.any_media
        key = Withdraw, self.positions
        if key not in ctx.memo:
            text = counts = None
            if ctx.new_media and any(ctx.known_new.has_media):
                known = ctx.known_new
                check_endings(ctx, known.is_perceptual)
                text, counts = ctx.tokens.is_text, tuple((known.valid & ~known.is_perceptual).sum(axis=1).tolist())
            ctx.memo[key] = Work(text, text, positions=_counted(ctx) if is_counted else None, counts=counts)
        return ctx.memo[key]

    def rests(self, ctx: ForwardContext) -> bool:
        """Whether no new token leaves, and none is counted anew."""
        return not (ctx.new_media or (self.positions == "dense" and ctx.any_media))


def _counted(ctx: ForwardContext) -> Tensor:
    """(B, S) how many tokens of text stand before each new one in its sample."""
    count = ctx.all_tokens.is_text.cumsum(dim=1)[:, -ctx.tokens.shape[1] :] - 1
    return count.clamp(min=0)
