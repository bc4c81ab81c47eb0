"""Connections: how many there may be, of one client too, and for how long one may be silent. HTTP/1.1 as uvicorn speaks
it; what it answers itself has the shape of all other errors here."""

from __future__ import annotations

import asyncio
import http
import ipaddress
import json
import logging
from dataclasses import dataclass
from typing import Any, Self, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from alula.errors import UsageError, visible
from alula.serving.http.door import Receive, Scope, Send, respond
from alula.serving.http.problems import Problem
from alula.serving.http.taking import Counted

_log = logging.getLogger(__name__)

_MOST, _SHARE = 768, 256
_TOLD, _TOLD_SECONDS = 64, 2.0
"""connections that are told that there is no room, at once, and the seconds each has to ask; more are cut off"""
_SPARE = 192
"""files that the process has open beside its connections: `_TOLD` of others, and what models and media need"""
_LEAST = 32
_HEADERS_BYTES = 64 * 1024
_SHOWN = 200
"""characters that the log shows of what is wrong with a request, which holds what was sent"""
_RETRY = "2"
"""seconds after which it is worth to ask again"""


@dataclass(frozen=True, kw_only=True)
class Connections:
    """Of a server.

    Attributes:
        most: that are answered at once; more are told 503.
        per_address: of one client, an address of IPv4 or a network of 64 bits of IPv6; more are told 429.
        head_seconds: in which the headers of a request have to be whole, from the connection or from their first byte.
        idle_seconds: for which a connection is kept between two requests.
        stalled_seconds: after which a client is cut off that takes nothing of what waits to be sent.
    """

    most: int = _MOST
    per_address: int = _SHARE
    head_seconds: float = 20.0
    idle_seconds: int = 30
    stalled_seconds: float = 60.0

    @classmethod
    def fitting(cls, most: int | None = None, per_address: int | None = None) -> Self:
        """As many as were said, or as this process has room for.

        Raises:
            UsageError: more than it may open, or a share that is larger than the whole.
        """
        files = _open_files()
        if most is None:
            most = _MOST if files is None else min(_MOST, max(files - _SPARE, _LEAST))
        elif files is not None and most > files - _SPARE:
            raise UsageError(
                f"{most:,} connections and {_SPARE} files beside them are more than the {files:,} that may be open",
                where="--connections",
                remedy=f"ulimit -n {most + _SPARE} in the shell that starts it",
            )
        if per_address is not None and per_address > most:
            raise UsageError(
                f"one address cannot have {per_address:,} of {most:,} connections",
                where="--connections-per-address",
                remedy=f"say {most} at most, or raise --connections",
            )
        return cls(most=most, per_address=min(_SHARE, most) if per_address is None else per_address)


def _open_files() -> int | None:
    """How many files this process may have open; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


class Config(uvicorn.Config):
    """uvicorn's, with connections that are held to limits.

    Args:
        app: ASGI.
        connections: how many, and how long.
        more: of `uvicorn.Config`.
    """

    def __init__(self, app: Any, connections: Connections, **more: Any) -> None:
        super().__init__(
            app,
            http=Connection,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing here goes by where a request says that it came from
            ws="none",
            timeout_keep_alive=connections.idle_seconds,
            **more,
        )
        self.connections = connections


class Connection(H11Protocol):
    """One of them. uvicorn closes one that is silent between two requests; before the first, within headers, behind an
    answer and where nothing is taken of one it would wait for ever."""

    config: Config
    _refusal: Problem | None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Counted.of(transport))
        self.conn = _Speaking(h11.SERVER, _HEADERS_BYTES)
        self._limits = self.config.connections
        self._head: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        self._holder = holder_of(self.client[0] if self.client else "")
        others = [each for each in self.connections if isinstance(each, Connection) and each is not self]
        taken = [each for each in others if each._refusal is None]
        self._refusal = self._refused(taken)
        if self._refusal is None:
            self._expect_head(self._limits.head_seconds)
        elif len(others) - len(taken) < _TOLD:
            self.app = _Refusing(self._refusal)
            self._expect_head(_TOLD_SECONDS)
        else:
            transport.abort()

    def _refused(self, taken: list[Connection]) -> Problem | None:
        """Why there is no room beside those that were taken."""
        headers = {"retry-after": _RETRY, "connection": "close"}
        remedy = f"close some, or try again after {_RETRY} s or later"
        if len(taken) >= self._limits.most:
            return Problem(
                "the server has as many connections as it takes",
                status=503,
                code="too_many_connections",
                remedy=remedy,
                headers=headers,
            )
        if sum(each._holder == self._holder for each in taken) >= self._limits.per_address:
            return Problem(
                f"there are {self._limits.per_address:,} connections from this address, which is as many as one has",
                status=429,
                code="too_many_connections",
                remedy=remedy,
                headers=headers,
            )
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._taking):
            if timer is not None:
                timer.cancel()
        self._head = self._taking = None

    # -- what comes ---------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._head is None and not self._is_answering:  # of the next request, or the rest of one that was answered
            self._expect_head(self._limits.head_seconds)
        super().data_received(data)
        if self._is_answering and self._head is not None:
            self._head.cancel()
            self._head = None

    @property
    def _is_answering(self) -> bool:
        """The application has a request; it reads the body in a time of its own."""
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self, seconds: float) -> None:
        self._head = self.loop.call_later(seconds, self._too_late)

    def _too_late(self) -> None:
        self._head = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            said = f"the headers were not whole after {self._limits.head_seconds:g} seconds"
            self._tell(Problem(said, status=408, code="request_timeout"))
        else:
            self.timeout_keep_alive_handler()

    def handle_events(self) -> None:
        try:
            super().handle_events()
        except _InvalidError as error:
            self._refuse_invalid(str(error))

    def _refuse_invalid(self, why: str) -> None:
        """Answer what is no HTTP, and have the log say who sent it."""
        sender = ":".join(map(str, self.client)) if self.client else "a client"
        _log.warning("%s sent what is no valid HTTP/1.1: %s", sender, visible(why[:_SHOWN]))
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # behind or within an answer
            self.transport.close()
            return
        said = (
            f"this is no valid request of HTTP/1.1, or one with more than {_HEADERS_BYTES:,} bytes of headers, or of "
            "the line that begins a chunk of its body"
        )
        self._tell(Problem(said, code="invalid_http"))

    def _tell(self, problem: Problem) -> None:
        """Answer without the application, and close."""
        body = json.dumps(problem.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        events = (
            h11.Response(
                status_code=problem.status,
                headers=list(headers.items()),
                reason=http.HTTPStatus(problem.status).phrase.encode(),
            ),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for each in events:
            self.transport.write(self.conn.send(each) or b"")
        self.transport.close()
        if self.cycle is not None:  # the application may have begun on the request, and would answer a second time
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._expect_taken()

    # -- what goes ----------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_taken()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_taken()

    def _expect_taken(self) -> None:
        """Look after a while whether something was taken, as long as something waits to be sent."""
        if self._taking is None and self.transport.get_write_buffer_size():
            self._taking = self.loop.call_later(self._limits.stalled_seconds, self._look, self._taken())

    def _taken(self) -> int:
        return cast(Counted, self.transport).taken()

    def _look(self, before: int) -> None:
        self._taking = None
        if self._taken() <= before:
            self.transport.abort()
        else:
            self._expect_taken()


class _InvalidError(Exception):
    """What came is no HTTP."""


class _Speaking(h11.Connection):
    """One whose errors uvicorn does not catch: it logs them without a word of who it was or why."""

    def next_event(self) -> Any:
        try:
            return super().next_event()
        except h11.RemoteProtocolError as error:
            raise _InvalidError(str(error)) from error


class _Refusing:
    """An ASGI application that answers all alike."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(self._problem, send)


def holder_of(address: str) -> str:
    """Whose share a connection is of: an address, and in IPv6 the network of 64 bits that one household has."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # of sockets without one
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    mapped = found.ipv4_mapped
    return str(ipaddress.ip_network((found, 64), strict=False)) if mapped is None else str(mapped)
