"""A device that is not the CPU, for machines that have no other: it computes on the CPU and will not mix with it.

Inside `elsewhere()`, tensors made on (or moved to) `DEVICE` claim to live there. An operation that is given such a
tensor and a CPU tensor raises, as an accelerator's would; single numbers (tensors without dimensions) may come along
from the CPU, as they may there. Values are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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
    """Turns Python numbers into tensors and back on the CPU: torch does not let a dispatch mode see how."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.tolist and isinstance(args[0], _Remote):
            return args[0].inner.tolist()
        return func(*args, **kwargs)


class _Factories(TorchDispatchMode):
    """Gives those who ask for a tensor on `DEVICE` one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_MOVES = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [*_leaves(args), *_leaves(kwargs.values())]
    tensors = [each for each in given if isinstance(each, Tensor)]
    remote = [each for each in tensors if isinstance(each, _Remote)]
    if remote and func.overloadpacket not in _MOVES and any(t.dim() and not isinstance(t, _Remote) for t in tensors):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu")
    result = func(
        *(_mapped(_inside, arg) for arg in args), **{key: _mapped(_inside, arg) for key, arg in kwargs.items()}
    )
    asked = [each.type for each in given if isinstance(each, torch.device)]
    if func.overloadpacket is torch.ops.aten.copy_:
        away = isinstance(args[0], _Remote)
    else:
        away = asked[0] == DEVICE if asked else bool(remote)
    known = {id(each.inner): each for each in remote}  # what is written in place stays the tensor it was

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor) or not away:
            return value
        return known[id(value)] if id(value) in known else _Remote(value)

    return _mapped(outside, result)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """Of the lists that operators know (torch's own trees take most of the time of such a forward)."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(change, each) for each in value)
    return change(value)


def _inside(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == DEVICE:
        return torch.device("cpu")
    return value.inner if isinstance(value, _Remote) else value


@contextmanager
def elsewhere() -> Iterator[str]:
    """Within, `DEVICE` can be named wherever a device can."""
    with (
        patch.object(torch.accelerator, "synchronize", lambda: None),  # it is the CPU that computes
        patch.object(torch, "inference_mode", _no_gradients),
        _Literals(),
        _Factories(),
    ):
        yield DEVICE


def _no_gradients(mode: bool = True) -> Any:
    """In place of inference mode, whose tensors cannot be wrapped."""
    return torch.set_grad_enabled(not mode)
