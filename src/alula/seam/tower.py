"""What a vision tower is seen to make of images, before their tokens reach the decoder.

A tower runs before the decoder, often before the forward that its tokens come in (`generate` runs it once), and is told
of neither. What a reader makes of it is kept for the thread until the tower runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alula.anatomy import Anatomy
from alula.errors import SeamError
from alula.seam import dialect
from alula.seam.hooks import ByThread, Handle
from alula.seam.requests import Request, Tower


class TowerHooks:
    """The hooks of one host's tower, there only while somebody reads it."""

    def __init__(self, anatomy: Anatomy, marks: Callable[[], frozenset[Hashable]]) -> None:
        """
        Args:
            marks: those of what the thread begins now.
        """
        self.anatomy, self._marks = anatomy, marks
        self.requests: tuple[tuple[str, Request[Tower]], ...] = ()
        self.notes: ByThread[dict[str, Tensor]] = ByThread()
        self._seen: ByThread[dict[str, Tensor]] = ByThread()
        self._handles: list[RemovableHandle] = []

    def put(self, owner: str, request: Request[Tower]) -> None:
        """Have somebody read the tower.

        Raises:
            HostError: the host has none whose layers are known.
        """
        layer = self.anatomy.tower_layer()
        self.requests = (*self.requests, (owner, request))
        if not self._handles:
            self._handles = [layer.register_forward_hook(self._after_layer)]
            for name, hook in (("q_proj", self._after_query), ("k_proj", self._after_key)):
                part = next((each for path, each in layer.named_modules() if path.endswith(name)), None)
                if part is not None:
                    self._handles.append(part.register_forward_hook(hook))

    def keep_features(self, owner: str) -> Handle:
        """See `Seam.request_features`."""
        handle = self.anatomy.image_connector.register_forward_pre_hook(partial(self._before_connector, owner))
        return Handle(handle.remove)

    @torch.compiler.disable
    def _before_connector(self, owner: str, module: nn.Module, args: Any) -> None:
        features: Tensor = args[0].detach()
        if features.dim() != 3:
            raise SeamError(
                f"{type(module).__name__} is given features of the shape {tuple(features.shape)}, not image by image",
                remedy="do without (mks2.retrieval: null)",
            )
        self.notes.put({**(self.notes.get() or {}), owner: features})

    def drop(self, is_gone: Callable[[Request[Any]], bool]) -> None:
        """Take away those that are gone."""
        self.requests = tuple(each for each in self.requests if not is_gone(each[1]))
        if not self.requests:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self.notes, self._seen = ByThread(), ByThread()

    def _after_query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._note("query", output)

    def _after_key(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._note("key", output)

    def _note(self, name: str, heads: Tensor) -> None:
        self._seen.put({**(self._seen.get() or {}), name: heads.detach()})

    @torch.compiler.disable
    @torch.no_grad()
    def _after_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        seen, states = self._seen.get() or {}, dialect.hidden_of_output(output)
        self._seen.drop()
        marks = self._marks()
        notes = {
            owner: request.by.on_tower(states.detach(), seen.get("query"), seen.get("key"))
            for owner, request in self.requests
            if request.mark is None or request.mark in marks
        }
        if notes:
            self.notes.put(notes)
