"""Several processes at one run: what the first does for all of them, and what they are to agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def on_first(act: Callable[[], object]) -> None:
    """Have the first process do ``act``, which writes files; the others go on once it is done."""
    processes = PartialState()
    if processes.is_main_process:
        act()
    processes.wait_for_everyone()


def agreed(value: T) -> T:
    """The first process's value, on every process: rounding may differ between devices, decisions must not."""
    values: list[T] = broadcast_object_list([value], from_process=0)
    return values[0]


def from_first(read: Callable[[], T]) -> T | None:
    """What the first process reads from its disk, on every process."""
    return agreed(read() if PartialState().is_main_process else None)
