"""Fetching what a request names by its address: each host is resolved once, and the connection goes to an address that
was looked at. No proxy of the environment, no cookies, no compression; redirects are new addresses, checked anew."""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urljoin

import httpx

from alula.errors import quoted
from alula.serving.http.addresses import Address, Allowed, is_public
from alula.serving.http.problems import Problem

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""host and port -> IP addresses, best first"""

_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {"accept": "image/*, audio/*, video/*", "accept-encoding": "identity", "user-agent": "alula"}


@dataclass(frozen=True)
class Fetched:
    """What was found.

    Attributes:
        content: as sent.
        type: the media type that the host says it is, in small letters, without parameters.
    """

    content: bytes
    type: str


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, by the system's resolver.

    Raises:
        OSError: there are none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


@functools.cache
def _trust() -> ssl.SSLContext:
    """What certificates are held to; read once, since that takes a while."""
    return httpx.create_ssl_context(trust_env=False)


def _connecting() -> httpx.AsyncBaseTransport:
    """A connection of its own for each question: none is kept that a later one might be sent over."""
    return httpx.AsyncHTTPTransport(verify=_trust(), trust_env=False)


class Fetcher:
    """Fetches media from the hosts that were named.

    Args:
        allowed: these hosts.
        most: bytes of one content.
        seconds: for all of one, redirects included.
        hops: redirects that are followed.
        resolver: says where a host is.
        transport: connects; tests give one that leads to a server of theirs.
    """

    def __init__(
        self,
        allowed: Allowed,
        *,
        most: int,
        seconds: float = 10.0,
        hops: int = 3,
        resolver: Resolver = resolve,
        transport: Callable[[], httpx.AsyncBaseTransport] | None = None,
    ) -> None:
        self.allowed, self.most, self.seconds, self.hops = allowed, most, seconds, hops
        self._resolver, self._transport = resolver, transport or _connecting

    async def fetch(self, address: str, param: str) -> Fetched:
        """What lies at an address.

        Args:
            param: the field that names it, for errors.

        Raises:
            Problem: the address may not be asked (`Allowed`), its host lies inside, or what comes from there is too
                large, too slow, compressed, or no success.
        """
        try:
            async with asyncio.timeout(self.seconds):
                for _ in range(self.hops + 1):
                    found = await self._asked(self.allowed.check(address, param), param)
                    if isinstance(found, Fetched):
                        return found
                    address = urljoin(address, found)
        except TimeoutError:
            raise _failed(f"it took more than {self.seconds:g} seconds", param) from None
        raise _failed(f"it leads through more than {self.hops} redirects", param)

    async def _asked(self, address: Address, param: str) -> Fetched | str:
        """What one address answers: content, or where to go from there."""
        place = await self._place(address, param)
        literal = f"[{place}]" if ":" in place else place
        request = httpx.Request(
            "GET",
            httpx.URL(f"{address.scheme}://{literal}:{address.port}").copy_with(raw_path=address.target.encode()),
            headers={**_HEADERS, "host": address.authority},
            # what is shown to the host, and what its certificate is held to
            extensions={"sni_hostname": address.host, "timeout": httpx.Timeout(self.seconds).as_dict()},
        )
        try:
            async with self._transport() as transport:
                response = await transport.handle_async_request(request)
                try:
                    return await self._taken(response, param)
                finally:
                    await response.aclose()
        except httpx.HTTPError as error:  # of the connection, TLS, the protocol
            raise _failed(f"{address.authority} cannot be asked ({type(error).__name__})", param) from None

    async def _taken(self, response: httpx.Response, param: str) -> Fetched | str:
        if response.status_code in _REDIRECTS and (place := response.headers.get("location")):
            return str(place)
        if response.status_code != 200:
            raise _failed(f"its host answers {response.status_code}", param)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _failed("its host sends it compressed", param)
        stated = response.headers.get("content-length", "0")
        if not stated.isdecimal() or int(stated[:18]) > self.most:
            raise _failed(f"it is larger than {self.most:,} bytes", param)
        parts, size = [], 0
        assert isinstance(response.stream, httpx.AsyncByteStream)
        async for part in response.stream:
            size += len(part)
            if size > self.most:
                raise _failed(f"it is larger than {self.most:,} bytes", param)
            parts.append(part)
        return Fetched(b"".join(parts), response.headers.get("content-type", "").partition(";")[0].strip().lower())

    async def _place(self, address: Address, param: str) -> str:
        """The IP address that is connected to."""
        try:
            found = list(await self._resolver(address.host, address.port))
        except (OSError, UnicodeError):
            found = []
        if not found:
            raise _failed(f"there is no host {quoted(address.host, 80)}", param)
        # one that lies inside among others is no slip: the next answer might name it alone
        if not all(is_public(each) for each in found):
            raise Problem(
                f"{quoted(address.host, 80)} does not lie in the public internet",
                param=param,
                code="fetching_not_allowed",
                remedy="send the content itself (data:...;base64,...) or upload it",
            )
        return found[0]


def _failed(what: str, param: str) -> Problem:
    return Problem(f"this cannot be fetched: {what}", param=param, code="fetching_failed")
