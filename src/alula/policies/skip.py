"""Layers skipped, whole or in part, by image tokens or by all (IMA, arXiv 2405.16700; blocks, 2410.09454)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from alula.policies.base import Policy, Stand
from alula.policies.registry import register
from alula.seam import LayerView, Work
from alula.settings import Int, Number
from alula.tokens import TokenMap


@register
class Skip(Policy):
    """In some decoder layers, some tokens go without the MLP, without attention, or without both.

        Skip(part="mlp", layers=range(8, 32))           # image tokens skip the MLP from layer 8 on
        Skip(part="block", layers=range(2, 31, 2))      # and every second block
        Skip(part="attention", tokens="all", layers=(20,))

    What is skipped adds nothing to the residual stream; the rest of the layer is the host's.

    Attributes:
        part: what is skipped.
        layers: decoder layers, counted from 0, negative ones from the last; None: all.
        tokens: who skips it: those of images, videos and sounds ("image"), or all, generated ones included.
        share: of these tokens, evenly spread over each sample's in the forward they come in.
        keys: of tokens that skip attention. "absent": nobody attends to them there; "own": others attend to keys
            that the layer computes of them.
    """

    policy_type: ClassVar[str] = "skip"
    part: Literal["mlp", "attention", "block"]
    layers: tuple[Int, ...] | None = None
    tokens: Literal["image", "all"] = "image"
    share: Number = 1.0
    keys: Literal["absent", "own"] = "absent"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 < self.share <= 1:
            raise ValueError("share is larger than 0 and at most 1")
        if self.keys == "own" and self.part == "mlp":
            raise ValueError("tokens that skip the MLP leave keys anyway: keys says nothing about them")
        if self.keys == "own" and self.tokens == "all" and self.share == 1:
            raise ValueError("where all tokens skip attention, nobody reads keys")
        if self.layers is not None and not self.layers:
            raise ValueError("layers names none")
        return self

    def place(self, stand: Stand) -> None:
        has_parts = self.part != "block" or self.keys == "own"
        for layer in stand.anatomy.layer_indices(self.layers):
            stand.work(layer, self, has_parts=has_parts)

    def work(self, view: LayerView, hidden: Tensor) -> Work | None:
        """That of the tokens which do not skip, the same in all layers."""
        if self.tokens == "image" and not view.ctx.new_media:
            return None
        return view.ctx.once(_work, self, view.ctx.tokens)


def _work(policy: Skip, tokens: TokenMap) -> Work:
    skips = tokens.is_perceptual if policy.tokens == "image" else tokens.valid
    if policy.share < 1:
        count = skips.cumsum(dim=1)  # in double precision: half of 3 tokens is 1, whatever the model computes in
        skips = skips & ((count.double() * policy.share).floor() > ((count - 1).double() * policy.share).floor())
    stays = ~skips
    if policy.part == "mlp":
        return Work(feed=stays)
    keys = torch.ones_like(stays) if policy.keys == "own" else None
    if policy.part == "attention":
        return Work(attend=stays, keys=keys)
    return Work.of(stays) if keys is None else Work(stays, stays, keys)
