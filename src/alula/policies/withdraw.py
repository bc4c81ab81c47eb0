"""Withdrawal of perceptual tokens: from one layer on, they are gone (VTW, arXiv 2405.05803)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from alula.anatomy import Anatomy
from alula.errors import UsageError
from alula.policies.base import Policy, Stand
from alula.policies.endings import check_endings
from alula.policies.registry import register
from alula.seam import LayerView, Work
from alula.settings import Int


@register
class Withdraw(Policy):
    """The tokens of images, videos and sounds are in the first `layer` decoder layers and in none behind.

        with Withdraw(layer=16).on(model):
            model.generate(**inputs)

    VTW (arXiv 2405.05803) with the positions that tokens have anyway ("keep"). Which tokens leave is told by what they
    are, so several images, later turns, prompts that come in chunks and drafts are no special cases, and text alone
    keeps its bits.

    Attributes:
        layer: the first layer, counted from 0, that they are not in; as many layers see them. Larger than 0 and
            smaller than the number of layers: 0 is a model without images.
    """

    policy_type: ClassVar[str] = "withdraw"
    layer: Int

    def check(self, anatomy: Anatomy) -> None:
        """Raise a UsageError if a decoder has no such layer, or none before it."""
        count = anatomy.num_layers
        if not 0 < self.layer < count:
            raise UsageError(
                f"withdrawal at layer {self.layer} leaves "
                f"{'every' if self.layer else 'no'} layer of this decoder with images",
                where="layer",
                remedy=f"give one of 1 to {count - 1}",
            )

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
        if not ctx.new_media:
            return None
        if Withdraw not in ctx.memo:
            check_endings(ctx)
            ctx.memo[Withdraw] = Work.of(ctx.tokens.is_text)
        return ctx.memo[Withdraw]
