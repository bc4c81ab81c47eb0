"""What holds for one block: of a thread (or asyncio task) alone probes that listen, grafts that are disabled, a given
map; of a model its mode.

A forward looks at its thread's marks once, when it begins, and carries them along: layers that autograd recomputes in
a thread of its own find them as they were, and what another thread switches meanwhile does not reach it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

SECOND = "second"
"""a mark of forwards that are run again for the sake of a contrast (see `requests.Contrast`)"""

READING = "reading"
"""a mark of forwards that only read what another is about to be given (see `embeddings`)"""

_marks: ContextVar[frozenset[Hashable]] = ContextVar("alula_marks", default=frozenset())


@contextmanager
def marked(mark: Hashable) -> Iterator[None]:
    """Put a mark on the forwards that this thread begins inside the block."""
    before = _marks.get()
    _marks.set(before | {mark})
    try:
        yield
    finally:
        _marks.set(_marks.get() - ({mark} - before))


@contextmanager
def marked_instead(mark: Hashable, *others: Hashable) -> Iterator[None]:
    """Put other marks in the place of one, on the forwards that this thread begins inside the block."""
    before = _marks.get()
    _marks.set((before - {mark}) | set(others))
    try:
        yield
    finally:
        _marks.set(before)


def marks() -> frozenset[Hashable]:
    """The marks of this thread."""
    return _marks.get()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode inside the block, and back into its own mode after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
