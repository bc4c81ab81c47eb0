"""A request that was submitted, seen from outside."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator

from alula.serving.engine.events import Delta, Finished

Event = Delta | Finished


class Handle:
    """Iterate over it for the answer, in a thread or an event loop, once.

    What is not read yet is kept: a slow reader holds nobody up.
    """

    def __init__(self) -> None:
        self._events: deque[Event | BaseException] = deque()
        self._changed = threading.Condition()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._is_over = False
        self.is_cancelled = False

    def cancel(self) -> None:
        """End the answer here; it finishes with the reason "cancelled"."""
        self.is_cancelled = True

    def put(self, event: Event | BaseException) -> None:
        """Hand an event on, or the error that ends the answer."""
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
            waiting = self._waiting
        if waiting is not None:
            loop, there = waiting
            if not loop.is_closed():
                loop.call_soon_threadsafe(there.set)

    def __iter__(self) -> Iterator[Event]:
        while not self._is_over:
            with self._changed:
                self._changed.wait_for(lambda: self._events)
                event = self._events.popleft()
            yield self._seen(event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        there = asyncio.Event()
        with self._changed:
            self._waiting = asyncio.get_running_loop(), there
        while not self._is_over:
            there.clear()
            with self._changed:
                event = self._events.popleft() if self._events else None
            if event is None:
                await there.wait()
            else:
                yield self._seen(event)

    def _seen(self, event: Event | BaseException) -> Event:
        self._is_over = not isinstance(event, Delta)
        if isinstance(event, BaseException):
            raise event
        return event

    def result(self) -> tuple[str, Finished]:
        """The whole text and the end, when it is there.

        Raises:
            AlulaError, or whatever ended the answer.
        """
        pieces: list[str] = []
        for event in self:
            if isinstance(event, Finished):
                return "".join(pieces), event
            pieces.append(event.text)
        raise RuntimeError("the answer was read already")
