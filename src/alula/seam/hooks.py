"""Hooks that come and go while other threads run the model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


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
