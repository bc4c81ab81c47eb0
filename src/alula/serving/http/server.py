"""Listening: a socket of our own, and uvicorn behind it."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from alula.errors import AlulaError, UsageError
from alula.serving.http.connections import Config, Connections

_DRAIN = 10
"""seconds that running answers have once the server is told to stop; told again, they have none"""
_LAST = 2
"""seconds that connections have once their answers are over"""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        port: 0: any that is free.

    Raises:
        AlulaError: another program listens there. UsageError: this machine has no such address or right.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(2_048)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise AlulaError(
                f"port {port} is in use", where=host, remedy="stop what listens there, or take another: --port 8001"
            ) from None
        said = error.strerror or str(error)
        raise UsageError(f"cannot listen on port {port}: {said}", where=host, remedy="--host and --port") from None
    return found


def serve(
    app: Any,
    listening: socket.socket,
    *,
    connections: Connections | None = None,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve until the process is told to stop (Ctrl-C, SIGTERM); running answers have some seconds to end, and none
    once it is told again.

    Args:
        app: ASGI.
        listening: as `listen` gives it.
        connections: how many there may be; by default what this process has room for.
        ready: called once requests are answered.

    Raises:
        KeyboardInterrupt: Ctrl-C, once everything has ended.
    """
    config = Config(app, connections or Connections.fitting())
    log = logging.getLogger("uvicorn.error")
    log.addFilter(_tells)
    try:
        _Server(config, ready).run(sockets=[listening])
    finally:
        log.removeFilter(_tells)


def _tells(record: logging.LogRecord) -> bool:
    """Whether there is news in a record: that a request was let go when the server stopped is none."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError)


class _Server(uvicorn.Server):
    """Says when it answers, and ends what runs in an orderly way however often it is told to stop."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._ready = ready
        self._in_a_hurry = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # told again; uvicorn would leave its tasks where they are
            self._in_a_hurry = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        """After the seconds they have, have the application end (it tells each client), and then all connections."""
        until = time.monotonic() + _DRAIN
        while not self._in_a_hurry and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await self.lifespan.shutdown()
        await asyncio.sleep(_LAST)
        self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None and self.started:
            self._ready()
