"""A host's vocabulary made longer without touching its matrices: ids behind its own that somebody else embeds.

Shapes: B batch, S new tokens, d width of the stream, V the host's own vocabulary, N ids behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alula.anatomy import Anatomy
from alula.errors import HostError, UsageError
from alula.seam.hooks import ByThread
from alula.seam.requests import Request


class Wider(Protocol):
    """Something that has ids behind those of the host."""

    @property
    def enabled(self) -> bool:
        """Whether it takes part in what this thread does now."""

    @property
    def further_tokens(self) -> int:
        """N."""

    def embedded(self, ids: Tensor, embeds: Tensor) -> Tensor:
        """(B, S, d) of ids of both, the host's own as they are in `embeds`."""

    def further_logits(self, hidden: Tensor) -> Tensor:
        """(B, T, N) of what the head is given, (B, T, d)."""


class VocabularyHooks:
    """The hooks of one host's embeddings and head, there only while somebody asks."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.request: Request[Wider] | None = None
        self._ids: ByThread[Tensor] = ByThread()
        self._handles: list[RemovableHandle] = []

    def put(self, request: Request[Wider]) -> None:
        """Have somebody's ids behind the host's.

        Raises:
            HostError: the host has no head, or one for other ids than it embeds. UsageError: somebody has ids there.
        """
        anatomy = self.anatomy
        if anatomy.head is None:
            raise HostError(
                f"{type(anatomy.host).__name__} has no head that tells next tokens", remedy="load a causal LM"
            )
        weight: Any = anatomy.embeddings.weight
        rows, told = int(weight.shape[0]), getattr(anatomy.head, "out_features", None)
        if told is not None and told != rows:
            raise HostError(
                f"{type(anatomy.host).__name__} embeds {rows} ids and tells {told}: none can stand behind both",
                remedy="resize its embeddings (resize_token_embeddings)",
            )
        if self.request is not None:
            raise UsageError("another graft has ids behind the host's vocabulary", remedy="detach that one first")
        self.request = request
        self._handles = [
            anatomy.embeddings.register_forward_pre_hook(self._before_embeddings),
            anatomy.embeddings.register_forward_hook(self._after_embeddings),
            anatomy.head.register_forward_hook(self._after_head),
        ]

    @property
    def own(self) -> int | None:
        """V, where there are ids behind them now; None: there are none."""
        if self.request is None or not self.request.by.enabled:
            return None
        weight: Any = self.anatomy.embeddings.weight
        return int(weight.shape[0])

    def drop(self, is_gone: Callable[[Request[Any]], bool]) -> None:
        """Take it away if it is gone."""
        if self.request is not None and is_gone(self.request):
            for handle in self._handles:
                handle.remove()
            self.request, self._handles, self._ids = None, [], ByThread()

    def begin(self, given: Mapping[str, Any]) -> None:
        """A forward of the host with these arguments begins.

        Raises:
            UsageError: they hold labels.
        """
        if self.request is not None and given.get("labels") is not None and self.request.by.enabled:
            raise UsageError(
                "the host was given labels, and its own loss counts its own vocabulary alone",
                where=type(self.anatomy.host).__name__,
                remedy="leave labels out and take the loss of the logits (alula train does)",
            )

    def _before_embeddings(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        self._ids.drop()
        if self.request is None or not self.request.by.enabled or not args:
            return None
        ids: Tensor = args[0]
        self._ids.put(ids)
        weight: Any = module.weight
        further = (ids >= weight.shape[0]) & (ids < weight.shape[0] + self.request.by.further_tokens)
        # the host has no row for them; an id that nobody has is its error, as ever
        return ids.masked_fill(further, 0), *args[1:]

    def _after_embeddings(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        ids = self._ids.get()
        self._ids.drop()
        return None if ids is None or self.request is None else self.request.by.embedded(ids, output)

    def _after_head(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.request is None or not self.request.by.enabled:
            return None
        return torch.cat([output, self.request.by.further_logits(args[0]).to(output.dtype)], dim=-1)
