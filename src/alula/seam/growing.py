"""Cache layers that grow where they lie: a step adds its token behind those that are there, and copies none of these.

transformers' own growing layer makes a new tensor of all keys and one of all values in every step, for which a step
behind a long prompt pays a good part of what its attention costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


@dataclass(eq=False)
class _Room:
    """Memory for more tokens than are there.

    Attributes:
        tensor: (.., tokens, w); what is handed out is views of it.
        memory: the same, by which it is written to: torch takes nothing that was handed out, and that a backward may
            yet need, for changed by that.
        filled: its first tokens, as they were handed out last. Only who still holds this very tensor may write behind
            it: so what was ever read out of a cache, or goes on from it elsewhere, stays what it is, as with
            `torch.cat`.
        ahead: what was last written behind those without being handed out, see `cache`.
    """

    tensor: Tensor
    memory: Tensor
    filled: Tensor
    ahead: Tensor | None = None


class GrowingLayer(DynamicLayer):
    """A layer of a cache like transformers' own, that grows in place. What it hands out is the filled beginning of a
    longer tensor, and as little changed later as what that one hands out."""

    keys: Tensor
    values: Tensor
    _room: dict[str, _Room]  # what `keys` and `values` are the filled beginnings of, once they grow

    def __init__(self) -> None:
        super().__init__()
        self._room = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized or not self.keys.numel():
            return super().update(key_states, value_states, *args, **kwargs)
        self._grow(key_states, value_states)
        return self.keys, self.values

    def _grow(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens, in place where there is room behind those that are there."""
        # a backward may yet need the old tokens as they are, whoever asked for it; and a graph knows no addresses
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.keys, self.values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        else:
            self.keys, self.values = self._grown("keys", self.keys, keys), self._grown("values", self.values, values)

    def _grown(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        """The tensor called `name`, which is `old`, followed by `new`."""
        (filled, width), (count, new_width) = old.shape[-2:], new.shape[-2:]
        fit = old.dtype == new.dtype and old.device == new.device and width == new_width
        if not fit or old.shape[:-2] != new.shape[:-2]:  # torch knows what is to be said
            return torch.cat([old, new], dim=-2)
        if not width:  # nothing stands there but how many there are
            return old.new_empty(*old.shape[:-2], filled + count, 0)
        room = self._roomy(name, filled + count)
        room.memory.narrow(-2, filled, count).copy_(new)
        room.ahead = None
        room.filled = room.tensor.narrow(-2, 0, filled + count)
        return room.filled

    def _room_of(self, name: str, length: int) -> _Room | None:
        """The room in which up to `length` tokens may stand behind the tensor called `name`; None: there is none."""
        old: Tensor = getattr(self, name)
        room = self._room.get(name)
        if room is None or room.filled is not old or length > room.tensor.shape[-2]:
            return None
        return room if is_usable(old) else None

    def _roomy(self, name: str, length: int) -> _Room:
        """Room for at least `length` tokens whose first ones are those of the tensor called `name`."""
        room = self._room_of(name, length)
        if room is not None:
            return room
        old: Tensor = getattr(self, name)
        tensor = old.new_empty(*old.shape[:-2], length + max(length // 8, 32), old.shape[-1])
        filled = tensor.narrow(-2, 0, old.shape[-2])
        filled.copy_(old)
        setattr(self, name, filled)
        self._room[name] = _Room(tensor, tensor.data, filled)
        return self._room[name]

    def reset(self) -> None:
        self._room.clear()
        super().reset()

    def offload(self) -> None:
        self._room.clear()  # or its memory would stay on the device
        super().offload()


def is_usable(tensor: Tensor) -> bool:
    """Whether torch takes a tensor for everything here: one that was made in inference mode it changes there alone."""
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


def let_grow(cache: Cache) -> None:
    """Have all layers of a cache that are transformers' own growing ones grow in place from here on.

    Sliding, quantized and static ones, those of users' own and those whose memory is moved to and fro stay as they are.
    """
    if not getattr(cache, "offloading", False):
        cache.layers[:] = [_in_place(each) if type(each) is DynamicLayer else each for each in cache.layers]


def _in_place(layer: DynamicLayer) -> GrowingLayer:
    """One that goes on from a layer of transformers."""
    one = GrowingLayer()
    vars(one).update(vars(layer))
    return one
