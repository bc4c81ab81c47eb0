"""Layers whose MLP reads what attention reads (IMA's "parallel attention", arXiv 2405.16700)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from alula.errors import HostError
from alula.policies.base import Policy, Stand
from alula.policies.registry import register
from alula.seam import LayerView, Point
from alula.settings import Int


@register
class ParallelAttention(Policy):
    """In some decoder layers the MLP of some tokens is given what attention is given, so that it need not wait.

    A layer gives ``x + attention(n) + mlp(n)`` with n = norm(x), the norm in front of attention; that in front of the
    MLP plays no part. It computes as much as before, side by side where a device has room for that.

    Attributes:
        layers: decoder layers, counted from 0, negative ones from the last; None: all.
        tokens: whose: those of images, videos and sounds ("image"), or all, generated ones included.
    """

    policy_type: ClassVar[str] = "parallel_attention"
    layers: tuple[Int, ...] | None = None
    tokens: Literal["image", "all"] = "image"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layers is not None and not self.layers:
            raise ValueError("layers names none")
        return self

    @property
    def concerns_text(self) -> bool:
        return self.tokens == "all"

    def place(self, stand: Stand) -> None:
        family = stand.anatomy.family
        if family.mlp_norm is None and family.attention_norm is not None:
            raise HostError(
                "the MLP of this decoder is given what its attention is given already",
                remedy="leave the policy out: it would change nothing",
            )
        reading = _Reading(stand.owner, is_of_all=self.tokens == "all")
        for layer in stand.anatomy.layer_indices(self.layers):
            stand.at(Point.ATTENTION_INPUT, layer, reading.note)
            stand.at(Point.MLP_INPUT, layer, reading.give)


class _Reading:
    """What attention is given, for the MLP of the same layer of the same forward."""

    def __init__(self, owner: str, *, is_of_all: bool) -> None:
        self.owner, self.is_of_all = owner, is_of_all

    def note(self, view: LayerView, hidden: Tensor) -> None:
        if self.is_of_all or view.ctx.new_media:
            view.ctx.memo[self.owner, view.layer] = hidden

    def give(self, view: LayerView, hidden: Tensor) -> Tensor | None:
        noted: Tensor | None = view.ctx.memo.pop((self.owner, view.layer), None)
        if noted is None or self.is_of_all:
            return noted
        return torch.where(view.tokens.is_perceptual[..., None], noted, hidden)
