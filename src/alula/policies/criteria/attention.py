"""Attention of few tokens: of the last one (FastV, 2403.06764; PyramidDrop, 2410.17247), or of the instruction."""

from __future__ import annotations

import abc
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from alula.policies.base import Stand
from alula.policies.criteria.base import Scored
from alula.policies.criteria.candidates import Candidates, Layout, Scene, instructions
from alula.seam import LayerView, Work
from alula.tokens import on_device


class _Attention(Scored):
    """By attention, mean over heads.

    Attributes:
        of_layer: "before" is read as that layer is run. "itself": the layer is run as far as its queries and keys by
            the tokens that are left, to say who of them stays; only new tokens are looked at.
    """

    of_layer: Literal["before", "itself"] = "before"

    @property
    def reads_before(self) -> bool:
        return self.of_layer == "before"

    @property
    def reads_itself(self) -> bool:
        return self.of_layer == "itself"

    def place(self, stand: Stand, layer: int) -> None:
        reader = self._reader(stand.owner)
        if self.reads_before:
            stand.weights(layer - 1, reader)
        else:
            stand.foresight(layer, reader)

    @abc.abstractmethod
    def _reader(self, owner: str) -> _Reader:
        """Who reads it."""

    def scores(self, scene: Scene, candidates: Candidates) -> Tensor:
        return candidates.gather(scene.noted("attention", scene.view.layer - self.reads_before))


class LastQueryAttention(_Attention):
    """The tokens stay that the last token of their sample attends to most, mean over heads.

    FastV, eq. 3, and the row its code reads; of the layer itself, it is the ranking of PyramidDrop. Tokens are ranked
    in the forward they come in, by its last token: a prompt in pieces piece by piece, and without a cache anew in every
    step. Where a piece ends in an image and stages before took its end, by the last token that is left.
    """

    name: Literal["last_query_attention"] = "last_query_attention"

    def _reader(self, owner: str) -> _Reader:
        return _LastQuery(owner)


class InstructionAttention(_Attention):
    """The tokens stay that the instruction attends to most, mean over its tokens and over heads.

    The second stage of 2409.01162, with its visual tokens only. The instruction is the text behind the first image of a
    sample, all of its text where none is behind, its last token that is left where it has none. Attention of its tokens
    is written out for all heads at once.
    """

    name: Literal["instruction_attention"] = "instruction_attention"

    def _reader(self, owner: str) -> _Reader:
        return _Instruction(owner)


class _Reader(abc.ABC):
    """Notes the attention that new tokens get."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def standing(self, view: LayerView) -> Work | None:
        """Those left by the stages before."""
        return view.ctx.memo.get((self.owner, "left"))

    @abc.abstractmethod
    def queries(self, view: LayerView) -> Tensor | None:
        """(B, n) of the new tokens."""

    def on_weights(self, view: LayerView, weights: Tensor) -> None:
        new = weights[..., -view.ctx.tokens.shape[1] :].mean(dim=1)
        view.ctx.memo[self.owner, "attention", view.layer] = self.mean(view, new)

    def mean(self, view: LayerView, weights: Tensor) -> Tensor:
        """(B, S) of the (B, n, S) attention of the queries."""
        return weights[:, 0]


class _LastQuery(_Reader):
    def queries(self, view: LayerView) -> Tensor | None:
        """(B, 1) the last new token of every sample."""
        return last_query(view) if view.ctx.new_media else None


class _Instruction(_Reader):
    def queries(self, view: LayerView) -> Tensor | None:
        """(B, n) of the instruction, its last token once more where it is shorter."""
        if not view.ctx.new_media:
            return None
        index, _ = instructions(view)
        texts = view.ctx.once(Layout.of, view.ctx.tokens).text_counts
        if view.index is None or all(texts):
            return index
        return torch.where(on_device(np.array(texts) == 0, index.device)[:, None], last_query(view), index)

    def mean(self, view: LayerView, weights: Tensor) -> Tensor:
        _, is_there = instructions(view)
        return (weights * is_there[..., None]).sum(dim=1) / is_there.sum(dim=1, keepdim=True)


def last_query(view: LayerView) -> Tensor:
    """(B, 1) the last new token of every sample that stands in the layer."""
    valid = view.ctx.tokens.valid
    if view.index is not None and view.ctx.once(Layout.of, view.ctx.tokens).ends_in_image:
        valid = valid & view.present
    return (valid * torch.arange(valid.shape[1], device=valid.device)).argmax(dim=1, keepdim=True)
