"""What hooks need where other threads run the model, and where hooks come and go meanwhile."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

T = TypeVar("T")


class ByThread(Generic[T]):
    """A value per thread: what one hook leaves for another of the same forward.

    Unlike `threading.local` it can be copied with the model.
    """

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def put(self, value: T) -> None:
        self._values[threading.get_ident()] = value

    def get(self) -> T | None:
        return self._values.get(threading.get_ident())

    def drop(self) -> None:
        self._values.pop(threading.get_ident(), None)


class Handle:
    """Takes away again what was put at a point or asked of the seam.

    In a copy of the host it takes away what the copy has: what it calls has to be a method, of which a copy has its
    own, and no function that closes over the host.
    """

    def __init__(self, remove: Callable[..., None], *given: Any) -> None:
        """
        Args:
            remove: is called with what is ``given``.
        """
        self._remove, self._given = remove, given

    def remove(self) -> None:
        self._remove(*self._given)


def with_keywords(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook, to be registered ``with_kwargs=True``, that does nothing where it is called without them.

    torch enters a hook, and that it wants keyword arguments, in two tables one after the other (and takes it out of
    them likewise). A thread whose forward passes in between calls it without: a forward that began before the hook was
    there, which is none of its business.
    """
    whole = inspect.unwrap(hook).__code__.co_argcount

    @functools.wraps(hook)
    def guarded(*given: Any) -> Any:
        return hook(*given) if len(given) == whole else None

    return guarded


def settle_captures(model: nn.Module) -> None:
    """Have transformers put on what it collects hidden states by, which it does when some are first asked for.

    It is done under a lock and once per model, which a copy that is made meanwhile by another thread knows nothing of:
    half the hooks would be on it, and be put on again.
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or not module._can_record_outputs:
            continue
        # for a whole model they are put on all models in it, also on those that have them
        if not any(getattr(part, "_output_capturing_hooks_installed", False) for part in module.modules()):
            maybe_install_capturing_hooks(module)
