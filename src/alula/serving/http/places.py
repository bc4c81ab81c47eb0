"""What stands before the engine: requests that came and are not handed to it yet, and what they hold meanwhile."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Self

from alula.serving.engine import Engine
from alula.serving.http.failures import queue_full

_FREE = 1 << 16
"""bytes of a request that are not counted: short ones are not refused for what long ones hold"""
_LARGE_BYTES, _LARGE_PIXELS = 1 << 24, 1 << 23
"""after which memory is given back to the system: its allocator keeps what was freed in pieces of up to 32 MB"""


class Places:
    """The places there are.

    Args:
        engine: that has a queue of its own; both together have at most `Limits.queue` requests.
        most_bytes: of bodies and of what was fetched, over all requests.
        most_pixels: of decoded media, over all requests.
    """

    def __init__(self, engine: Engine, *, most_bytes: int, most_pixels: int) -> None:
        self._engine, self.most_bytes, self.most_pixels = engine, most_bytes, most_pixels
        self.before = self.bytes = self.pixels = 0
        self._counting = threading.Lock()

    @property
    def waiting(self) -> int:
        """Requests that wait: here, and in the engine."""
        return self.before + self._engine.queued

    def take(self) -> Place:
        """A place for a request whose body is still to come.

        Raises:
            Problem: 429, there is none.
        """
        if self.waiting >= self._engine.limits.queue:
            raise queue_full()
        return Place(self)

    def count(self, before: int = 0, held: int = 0, pixels: int = 0) -> None:
        with self._counting:
            self.before += before
            self.bytes += held
            self.pixels += pixels


class Place:
    """Of one request. It is given up at the end of a ``with`` block, but where somebody keeps it (`keep`).

    Attributes:
        arrived: when its body was whole, by `time.monotonic`.
    """

    def __init__(self, places: Places) -> None:
        self._places, self.arrived = places, time.monotonic()
        self._is_before, self._is_kept = True, False
        self._bytes = self._pixels = 0
        places.count(before=1)

    def whole(self) -> None:
        """Its body is there."""
        self.arrived = time.monotonic()

    def hold(self, count: int) -> None:
        """Hold so many more bytes.

        Raises:
            Problem: 429, all requests together would hold too many.
        """
        was, self._bytes = self._bytes, self._bytes + count
        counted = max(self._bytes - _FREE, 0) - max(was - _FREE, 0)
        self._places.count(held=counted)
        if counted and self._places.bytes > self._places.most_bytes:
            raise queue_full("requests that wait hold too many bytes together")

    def show(self, pixels: int) -> None:
        """Hold so many more decoded pixels.

        Raises:
            Problem: 429, as `hold`.
        """
        self._pixels += pixels
        self._places.count(pixels=pixels)
        if self._places.pixels > self._places.most_pixels:
            raise queue_full("requests that wait hold too many pixels together")

    @property
    def is_large(self) -> bool:
        """Whether memory should be given back behind it."""
        return self._bytes > _LARGE_BYTES or self._pixels > _LARGE_PIXELS

    def keep(self) -> None:
        """Somebody else will `close` it."""
        self._is_kept = True

    def enter(self) -> None:
        """The engine counts it from now on."""
        if self._is_before:
            self._is_before = False
            self._places.count(before=-1)

    def leave(self) -> None:
        """It is handed on, or refused: its bytes are let go."""
        self.enter()
        counted, self._bytes = max(self._bytes - _FREE, 0), 0
        self._places.count(held=-counted)

    def close(self) -> None:
        """Nothing is left of it."""
        self.leave()
        pixels, self._pixels = self._pixels, 0
        self._places.count(pixels=-pixels)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_kept:
            self.close()


def give_back() -> None:
    """Give freed memory back to the system, where its C library (glibc) keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
