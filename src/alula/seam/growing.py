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
        tensor: (.., tokens, w).
        filled: how many of its first tokens were handed out. These are never written again, whoever shares them, so
            that what was read out of a cache, or goes on from it elsewhere, stays what it is, as with `torch.cat`.
    """

    tensor: Tensor
    filled: int

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is all that was handed out of it, behind which may be written."""
        whole = self.tensor
        if whole.is_inference() and not torch.is_inference_mode_enabled():
            return False
        return (
            tensor.shape[-2] == self.filled
            and tensor.data_ptr() == whole.data_ptr()
            and tensor.stride() == whole.stride()
            and tensor.shape[:-2] == whole.shape[:-2]
            and tensor.dtype == whole.dtype
        )


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
        self.keys, self.values = self._grown("keys", key_states), self._grown("values", value_states)
        return self.keys, self.values

    def _grown(self, name: str, new: Tensor) -> Tensor:
        """The tensor called `name` followed by `new`, in place where there is room behind it."""
        old: Tensor = getattr(self, name)
        # a backward may yet need the old tokens as they are, whoever asked for it; and a graph knows no addresses
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _fit(old, new):
            return torch.cat([old, new], dim=-2)
        filled, length = old.shape[-2], old.shape[-2] + new.shape[-2]
        room = self._roomy(name, length)
        longer = room.tensor[..., :length, :]
        longer[..., filled:, :] = new
        room.filled = length
        return longer

    def _roomy(self, name: str, length: int) -> _Room:
        """Room for at least `length` tokens whose first ones are those of the tensor called `name`."""
        old: Tensor = getattr(self, name)
        room = self._room.pop(name, None)
        if room is None or not room.holds(old) or length > room.tensor.shape[-2]:
            room = None  # let go before there is more
            filled = old.shape[-2]
            tensor = old.new_empty(*old.shape[:-2], length + max(length // 8, 32), old.shape[-1])
            tensor[..., :filled, :] = old
            setattr(self, name, tensor[..., :filled, :])
            room = _Room(tensor, filled)
        self._room[name] = room
        return room

    def reset(self) -> None:
        self._room.clear()
        super().reset()

    def offload(self) -> None:
        self._room.clear()  # or its memory would stay on the device
        super().offload()


def _fit(old: Tensor, new: Tensor) -> bool:
    """Whether one can stand behind the other as it is; where it cannot, `torch.cat` knows what is to be said."""
    return (
        old.dtype == new.dtype
        and old.device == new.device
        and old.shape[:-2] == new.shape[:-2]
        and old.shape[-1] == new.shape[-1]
    )


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
