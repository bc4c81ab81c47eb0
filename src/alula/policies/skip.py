"""Layers skipped, whole or in part, by image tokens or by all (IMA, arXiv 2405.16700; blocks, 2410.09454)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from alula.draws import mixed
from alula.errors import HostError, UsageError
from alula.policies.base import Policy, Stand
from alula.policies.registry import register
from alula.seam import ForwardContext, LayerView, Tokens, Work
from alula.settings import Int, Number
from alula.tokens import TokenMap


@register
class Skip(Policy):
    """In some decoder layers, some tokens go without the MLP, without attention, or without both.

        Skip(part="mlp", layers=range(8, 32))           # image tokens skip the MLP from layer 8 on
        Skip(part="block", layers=range(2, 31, 2))      # and every second block
        Skip(part="block", layers=(20, 23), keys="own")  # frozen in these layers (ShortV)
        Skip(part="block", layers=range(2, 31, 2), tokens="all", when="prompts", keys="lent")
        Skip(part="mlp", layers=range(16, 32), tokens="all", when="steps")

    What is skipped adds nothing to the residual stream; the rest of the layer is the host's.

    Attributes:
        part: what is skipped.
        layers: decoder layers, counted from 0, negative ones from the last; None: all.
        tokens: who skips it: those of images, videos and sounds ("image"), or all, generated ones included.
        when: for tokens="all", in which forwards: in steps of one token behind a cache, in all others ("prompts", what
            is drafted and pieces of a prompt as well), or "always".
        share: of these tokens, of each sample's in the forward they come in, rounded down.
        choice: which share: evenly spread ("strided"), the "first", drawn at "random", or those of the largest "norm"
            where they enter the first of the layers, whom what is added changes least.
        seed: of the draw, which goes by it and by a token's place in its sample; None: 0.
        keys: of tokens that skip attention. "absent": nobody attends to them there; "own": others attend to keys
            that the layer computes of them; "lent": to the keys that they have in the layer before (as in IMA's code,
            where steps that run a layer read what its prompt skipped). Lent keys are read out of the cache, and refused
            in a forward without one.
    """

    policy_type: ClassVar[str] = "skip"
    part: Literal["mlp", "attention", "block"]
    layers: tuple[Int, ...] | None = None
    tokens: Literal["image", "all"] = "image"
    when: Literal["always", "prompts", "steps"] = "always"
    share: Number = 1.0
    choice: Literal["strided", "first", "random", "norm"] = "strided"
    seed: Int | None = None
    keys: Literal["absent", "own", "lent"] = "absent"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 < self.share <= 1:
            raise ValueError("share is larger than 0 and at most 1")
        if self.layers is not None and not self.layers:
            raise ValueError("layers names none")
        if self.keys != "absent" and self.part == "mlp":
            raise ValueError("tokens that skip the MLP leave keys anyway: keys says nothing about them")
        if self.keys != "absent" and self._is_everybody and self.when == "always":
            raise ValueError("where all tokens skip attention, nobody reads keys")
        if self.when != "always" and self.tokens == "image":
            raise ValueError(f'images come in prompts alone: when="{self.when}" goes with tokens="all"')
        if self.when == "steps" and self.share < 1:
            raise ValueError("a step is one token, of which there is no share")
        if self.choice != "strided" and self.share == 1:
            raise ValueError("where all skip there is no choice: give a share")
        if self.seed is not None and self.choice != "random":
            raise ValueError('a seed goes with choice="random"')
        return self

    @property
    def _is_everybody(self) -> bool:
        return self.tokens == "all" and self.share == 1

    @property
    def concerns_text(self) -> bool:
        return self.tokens == "all"

    @property
    def goes_by_steps(self) -> bool:
        return self.when != "always"

    def place(self, stand: Stand) -> None:
        has_parts = self.part != "block" or self.keys == "own"
        for layer in stand.anatomy.layer_indices(self.layers):
            if self.keys == "lent":
                _check_lender(stand, layer)
            stand.work(layer, self, has_parts=has_parts)

    def work(self, view: LayerView, hidden: Tensor) -> Work | None:
        """That of the tokens which do not skip, the same in all layers."""
        ctx = view.ctx
        if self.rests(ctx):
            return None
        key = Skip, id(self)
        if key not in ctx.memo:
            ctx.memo[key] = self._work(ctx.tokens, hidden.detach(), self._counts(ctx))
        return ctx.memo[key]

    def rests(self, ctx: ForwardContext) -> bool:
        """Whether no token skips anything."""
        if self.tokens == "image" and not ctx.new_media:
            return True
        return self.when != "always" and ctx.is_step != (self.when == "steps")

    def _counts(self, ctx: ForwardContext) -> tuple[int, ...] | None:
        """How many tokens of each sample do not skip, where the host knows it and some do."""
        if self.tokens == "all" or self.share < 1 or self.keys == "lent" or not any(ctx.known_new.has_media):
            return None
        known = ctx.known_new
        return tuple((known.valid & ~known.is_perceptual).sum(axis=1).tolist())

    def _work(self, tokens: TokenMap, hidden: Tensor, counts: tuple[int, ...] | None) -> Work:
        skips = None if self._is_everybody else self._skips(tokens, hidden)
        stays: Tokens = False if skips is None else ~skips
        if self.part == "mlp":
            return Work(feed=stays, counts=counts)
        keys: Tokens = None if self.keys == "own" else False
        lend: Tokens = skips if self.keys == "lent" else False
        return Work(stays, None if self.part == "attention" else stays, keys, lend, counts=counts)

    def _skips(self, tokens: TokenMap, hidden: Tensor) -> Tensor:
        """(B, S) bool."""
        these = tokens.is_perceptual if self.tokens == "image" else tokens.valid
        if self.share == 1:
            return these
        count = these.cumsum(dim=1).double()  # half of 3 tokens is 1, whatever the model computes in
        if self.choice == "strided":
            return these & (self._share_of(count) > self._share_of(count - 1))
        wanted = self._share_of(count[:, -1:])
        if self.choice == "first":
            return these & (count <= wanted)
        drawn = _drawn(tokens.position, self.seed or 0) if self.choice == "random" else hidden.float().norm(dim=-1)
        order = drawn.masked_fill(~these, -1).argsort(dim=1, descending=True, stable=True)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return these & (torch.empty_like(order).scatter(1, order, places) < wanted)

    def _share_of(self, count: Tensor) -> Tensor:
        """How many of (B, ..) float64 counts of tokens: 29 of 100 by 0.29, though their product is a little less."""
        return (count * self.share + 1e-9).floor()


def _check_lender(stand: Stand, layer: int) -> None:
    if not layer:
        raise UsageError("layer 0 has no layer before it to take keys of", where="layers", remedy="leave it out")
    kinds = [stand.anatomy.layer_type(each) for each in (layer - 1, layer)]
    if kinds[0] != kinds[1]:
        raise HostError(
            f"decoder layer {layer} ({kinds[1]}) turns keys by other angles than layer {layer - 1} ({kinds[0]}) and "
            "cannot take them",
            remedy='give keys="own" or "absent", or other layers',
        )


def _drawn(place: Tensor, seed: int) -> Tensor:
    """(B, S) numbers of 32 bits that look drawn, the same for the same place wherever they are computed."""
    drawn = ((place + 1) * 0x9E3779B1 + (mixed(seed) & 0xFFFFFFFF)) & 0xFFFFFFFF
    for _ in range(2):
        drawn = ((drawn ^ (drawn >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return drawn ^ (drawn >> 16)
