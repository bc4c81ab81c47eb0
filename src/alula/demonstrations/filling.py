"""A bank from a source of conversations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from alula.data import Source
from alula.demonstrations.bank import Bank
from alula.demonstrations.demonstration import Demonstration, demonstrations_in
from alula.errors import UsageError


class Filled(NamedTuple):
    """What filling a bank came to.

    Attributes:
        conversations: that were read.
        without: those among them in which nothing is a demonstration.
        encoded: demonstrations that are new in the bank.
        known: those that were there already.
    """

    conversations: int
    without: int
    encoded: int
    known: int


def conversations(source: Source, n: int | None = None) -> int:
    """How many conversations of a source are meant by the first ``n``; None: all.

    Raises:
        UsageError: all are meant, and the source never ends.
    """
    sizes = [size for size in (n, source.size) if size is not None]
    if not sizes:
        raise UsageError(
            "this source never ends", where=source.name, remedy="say how many conversations to read (--items)"
        )
    return min(sizes)


def fill(
    bank: Bank,
    source: Source,
    *,
    n: int | None = None,
    batch_size: int = 16,
    on_done: Callable[[int], None] | None = None,
) -> Filled:
    """Encode what a source's conversations hold of demonstrations into a bank, where it is not there yet.

    Args:
        n: conversations that are read, the first ones; None: all.
        batch_size: demonstrations of one forward.
        on_done: called with how many conversations were read, from time to time.

    Raises:
        UsageError: as `conversations`. DataError: a conversation cannot be read.
    """
    total, without, encoded, known = conversations(source, n), 0, 0, 0
    waiting: dict[str, Demonstration] = {}
    read = 0
    for index in range(total):
        found = [*demonstrations_in(source[index].messages)]
        without += not found
        read += 1
        for demonstration in found:
            if demonstration in bank or bank.key(demonstration) in waiting:
                known += 1
            else:
                waiting[bank.key(demonstration)] = demonstration
        if len(waiting) >= batch_size or index == total - 1:
            bank.encoded([*waiting.values()], batch_size=batch_size)
            encoded += len(waiting)
            waiting.clear()
            if on_done is not None:
                on_done(read)
            read = 0
    return Filled(total, without, encoded, known)
