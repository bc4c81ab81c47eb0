"""What a client has taken of what was sent to it: no protocol of asyncio's is told."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast


class Counted:
    """A transport that counts what is written to it; all else is the transport's own.

    Args:
        transport: of a socket.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._written = 0

    @classmethod
    def of(cls, transport: asyncio.Transport) -> asyncio.Transport:
        return cast(asyncio.Transport, cls(transport))

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    def taken(self) -> int:
        """Bytes that the client's system has confirmed: neither asyncio nor this system keeps them."""
        return self._written - self._transport.get_write_buffer_size() - _kept(self._transport)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _kept(transport: asyncio.Transport) -> int:
    """Bytes of a connection that the system keeps until they are confirmed, some megabytes at most; 0 where it does not
    say (Windows): what it keeps counts as taken there."""
    if sys.platform == "win32":
        return 0
    import fcntl
    import termios

    try:
        held = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):  # no such question, or closed meanwhile
        return 0
    return int.from_bytes(held, sys.byteorder)
