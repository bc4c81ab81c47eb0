"""A device that is not the CPU, for machines that have no other: it computes on the CPU and will not mix with it.

Inside `elsewhere()`, tensors made on (or moved to) `DEVICE` claim to live there. An operation that is given such a
tensor and a CPU tensor raises, as an accelerator's would; single numbers (tensors without dimensions) may come along
from the CPU, as they may there. Values are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "lazy"  # the one type besides "meta" that this build of torch can guard without having its kernels


class _Remote(Tensor):
    """A CPU tensor that says it is on `DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Remote:
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(DEVICE, 0),
            requires_grad=inner.requires_grad,
        )
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{self.inner!r} on {DEVICE}"


class _Literals(TorchFunctionMode):
    """Makes tensors of Python numbers on the CPU and moves them: torch hides from a dispatch mode how it makes them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


class _Factories(TorchDispatchMode):
    """Gives those who ask for a tensor on `DEVICE` one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    remote = [each for each in given if isinstance(each, _Remote)]
    asked = kwargs.get("device")
    to = None if asked is None else torch.device(asked).type
    moves = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    if remote and not moves and any(each.dim() and not isinstance(each, _Remote) for each in given):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu")
    if to == DEVICE:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, _Remote) else x, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    away = to == DEVICE if to is not None else bool(remote)
    if func.overloadpacket is torch.ops.aten.copy_:
        return args[0]
    known = {id(each.inner): each for each in remote}  # what is written in place stays the tensor it was

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known.get(id(value)) or (_Remote(value) if away else value)

    return tree_map(wrap, result)


@contextmanager
def elsewhere() -> Iterator[str]:
    """Within, `DEVICE` can be named wherever a device can."""
    with _Literals(), _Factories():
        yield DEVICE
