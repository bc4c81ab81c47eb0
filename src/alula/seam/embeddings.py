"""What the decoder is given, and who writes it anew: images encoded again, knowing what was read.

A connector runs before the decoder, in the same forward or (`generate` runs it once) before it. What it was given and
what it made is kept for the thread until it runs again. When the decoder is about to begin, its inputs are handed to
those who asked; they may have the decoder read these first.

Shapes: B samples, S new tokens, d the decoder's width; N images, P positions of the tower, T tokens of an image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alula.anatomy import NAME, Anatomy
from alula.errors import SeamError
from alula.items import FEATURES
from alula.seam import dialect
from alula.seam.context import ForwardContext
from alula.seam.hooks import ByThread, with_keywords
from alula.seam.requests import Request
from alula.seam.scope import READING, SECOND, evaluating, marked, marks

Read = Callable[[], Tensor]
"""has the decoder read its inputs as they are: (B, S, d) final states, without gradients"""


@dataclass(eq=False)
class Seen:
    """What the connector of images did last in this thread.

    Attributes:
        features: (N, P, width) what it was given, with gradients.
        tokens: (N, T, d) what it made of them, without.
        is_new: it ran in the forward that is under way, whose images these then are.
        is_piece: the forward under way holds a piece of a prompt (`generate` with `prefill_chunk_size`).
        memo: what is kept as long as they are, by whatever key.
    """

    features: Tensor
    tokens: Tensor
    is_new: bool = True
    is_piece: bool = False
    memo: dict[Hashable, Any] = field(default_factory=dict)


class Rewriter(Protocol):
    """Something that writes the decoder's inputs anew where images stand."""

    def rewritten(self, ctx: ForwardContext, embeds: Tensor, seen: Seen | None, read: Read) -> Tensor | None:
        """(B, S, d) other inputs; None: they stay as they are. Asked in forwards that bring images.

        Args:
            ctx: the forward.
            embeds: (B, S, d) what the decoder is about to be given.
            seen: the images that the connector encoded last; None: it was not seen to encode any.
            read: a forward of the decoder over `embeds`, behind the cache there is. It leaves nothing in that cache, no
                probe reads it, and nobody writes its inputs anew.
        """


class EmbeddingHooks:
    """The hooks of one host's connector and decoder, there only while somebody asks."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.requests: tuple[Request[Rewriter], ...] = ()
        self._seen: ByThread[Seen] = ByThread()
        self._handles: list[RemovableHandle] = []

    def put(self, request: Request[Rewriter]) -> None:
        """Have somebody write inputs anew.

        Raises:
            HostError: the host has no connector that only images go through.
        """
        connector = self.anatomy.image_connector
        self.requests = (*self.requests, request)
        if not self._handles:
            self._handles = [
                connector.register_forward_hook(self._after_connector),
                self.anatomy.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            ]

    def drop(self, is_gone: Callable[[Request[Any]], bool]) -> None:
        """Take away those that are gone."""
        self.requests = tuple(each for each in self.requests if not is_gone(each))
        if not self.requests:
            for handle in self._handles:
                handle.remove()
            self._handles, self._seen = [], ByThread()

    def begin(self, given: Mapping[str, Any]) -> None:
        """A forward with these arguments begins: what was seen so far was not seen in it."""
        seen = self._seen.get()
        if seen is not None and READING not in marks():
            made = (given.get(FEATURES) or {}).get("image")
            # `generate` hands on what towers made, but for pieces of a prompt, which get what the projector made alone
            seen.is_new, seen.is_piece = False, made is not None and getattr(made, "last_hidden_state", made) is None

    @torch.compiler.disable
    def _after_connector(self, connector: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._seen.put(Seen(args[0], output.detach()))

    @with_keywords
    @torch.compiler.disable  # it may call the host
    def _before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ctx, seen = kwargs.get(NAME), self._seen.get()
        if not isinstance(ctx, ForwardContext) or not ctx.new_media or READING in ctx.marks:
            return None
        asked = [each for each in self.requests if each.mark is None or each.mark in ctx.marks]
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        if embeds is None:
            raise SeamError(f"{type(decoder).__name__} was not given its inputs by name", remedy=dialect.REMEDY)
        for request in asked:
            found = request.by.rewritten(ctx, embeds, seen, partial(self._read, ctx, embeds, kwargs))
            embeds = embeds if found is None else found
        if seen is not None and seen.features.requires_grad:
            self._seen.drop()  # or the graph would be kept until the next images come
        return args, {**kwargs, "inputs_embeds": embeds}

    @torch.no_grad()
    def _read(self, ctx: ForwardContext, embeds: Tensor, kwargs: dict[str, Any]) -> Tensor:
        where = type(self.anatomy.backbone).__name__
        cache = dialect.cache_of(kwargs, where=where)
        given = {
            **ctx.given,
            "attention_mask": kwargs.get("attention_mask"),
            "position_ids": kwargs.get("position_ids"),
            "token_map": ctx.tokens,
            "use_cache": False,
        }
        mask = given["attention_mask"]
        # a mask that `generate` made for a cache of a fixed size speaks of all keys there will be
        is_of_cache = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() > 2)
        if cache is not None and (is_of_cache or int(cache.get_seq_length())):
            given |= {dialect.cache_keyword(): copy.deepcopy(cache), "use_cache": True}
        with marked(READING), marked(SECOND), evaluating(self.anatomy.backbone):  # dropout has no part in reading
            output = self.anatomy.backbone(inputs_embeds=embeds.detach(), **given)
        states: Tensor = output.last_hidden_state
        return states
