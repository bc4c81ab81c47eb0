"""Which addresses of the web a request may have fetched: a host that whoever started the server named, over http or
https, at a usual port, that resolves to nothing but public addresses.

Hosts are names alone. What would be read as a number by some resolver (``2130706433``, ``0x7f.1``, ``017700000001``) is
no name here, and neither are literal addresses: nobody who hosts pictures needs them, and the ways to write the same
inner address in them are many.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from alula.errors import UsageError, quoted
from alula.serving.http.problems import Problem

PORTS = {"http": 80, "https": 443}
LONGEST = 2_048
"""characters of an address"""

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}\.?")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""a last label by which browsers and C libraries read a host as a number (WHATWG URL, "ends in a number checker")"""
_ADDRESS = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<target>[/?][!-\"$-~]*)?")

# the tables of `ipaddress` differ from one Python to the next (192.0.0.8 is global in 3.11): they are not enough
_REFUSED_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        # IANA's registry of special addresses
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # public by its number; a cloud's own services for its machines
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""all that IANA gives out to be routed; what maps or tunnels IPv4 lies outside, but for these"""
_REFUSED_V6 = (
    ipaddress.IPv6Network("2001::/23"),  # Teredo, ORCHID, benchmarks
    ipaddress.IPv6Network("2001:db8::/32"),  # documentation
    ipaddress.IPv6Network("2002::/16"),  # 6to4
    ipaddress.IPv6Network("3ffe::/16"),  # the 6bone
    ipaddress.IPv6Network("3fff::/20"),  # documentation
)
_ISATAP = (0x5EFE, 0x0200_5EFE)
"""upper halves of interface identifiers that hold an IPv4 address (RFC 5214, section 6.1)"""


@dataclass(frozen=True)
class Address:
    """An address that may be asked for, once its host is resolved.

    Attributes:
        scheme: http or https.
        host: a name in small letters, without a dot at its end.
        port: of the host.
        target: path and query, as sent.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """Host, and port where it is not the scheme's own."""
        return self.host if self.port == PORTS[self.scheme] else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Allowed:
    """The hosts that may be asked.

    Attributes:
        hosts: (name, port) of each; a name that begins with ``*.`` means all names below it, not it itself; port None:
            the scheme's own.
    """

    hosts: tuple[tuple[str, int | None], ...] = ()

    @classmethod
    def of(cls, texts: Sequence[str]) -> Allowed:
        """Read ``images.example.org``, ``*.example.org`` or ``images.example.org:8443``.

        Raises:
            UsageError: anything else.
        """
        hosts = []
        for text in texts:
            name, colon, port = text.lower().partition(":")
            if host_of(name.removeprefix("*.")) is None or (colon and not (port.isdecimal() and 0 < int(port) < 65536)):
                raise UsageError(
                    f"{quoted(text)} is no name of a host",
                    where="--allow-host",
                    remedy="write images.example.org, *.example.org or images.example.org:8443",
                )
            hosts.append((name.removesuffix("."), int(port) if colon else None))
        return cls(tuple(hosts))

    @property
    def names(self) -> list[str]:
        """As they were written."""
        return [name if port is None else f"{name}:{port}" for name, port in self.hosts]

    def check(self, address: str, param: str) -> Address:
        """The parts of an address that may be asked for.

        Args:
            param: the field that it stands in, for errors.

        Raises:
            Problem: it may not.
        """
        found = split(address, param)
        for name, port in self.hosts:
            below = name.startswith("*.") and found.host.endswith(name[1:])
            if (below or found.host == name) and found.port == (PORTS[found.scheme] if port is None else port):
                return found
        if not self.hosts:
            raise Problem(
                "this server fetches nothing from the web",
                param=param,
                code="fetching_not_allowed",
                remedy="send the content itself (data:...;base64,...) or upload it; "
                "whoever runs the server may name hosts: --allow-host HOST",
            )
        raise Problem(
            f"this server fetches nothing from {quoted(found.authority, 80)}",
            param=param,
            code="fetching_not_allowed",
            remedy="send the content itself (data:...;base64,...) or upload it",
        )


def host_of(text: str) -> str | None:
    """The name of a host as it is compared and resolved; None where it is no name, or might be read as a number."""
    name = text.lower()
    if len(name) > 253 or not _NAME.fullmatch(name):
        return None
    name = name.removesuffix(".")
    return None if _NUMERIC.fullmatch(name.rpartition(".")[2]) else name


def split(address: str, param: str) -> Address:
    """The parts of an address.

    Raises:
        Problem: another scheme, a name and password, a host that is no name, a port that is none, or characters that
            addresses do not have.
    """

    def refuse(what: str, remedy: str | None = None) -> Problem:
        return Problem(f"{quoted(address, 80)} {what}", param=param, code="invalid_url", remedy=remedy)

    if len(address) > LONGEST:
        raise refuse(f"is longer than {LONGEST:,} characters")
    found = _ADDRESS.match(address)
    scheme = found["scheme"].lower() if found else ""
    if found is None or scheme not in PORTS:
        raise refuse("is no http or https address", "write https://HOST/PATH, or send the content itself")
    if address[found.end() :].partition("#")[0]:
        raise refuse("holds characters that addresses do not have", "write them as %XX")
    authority = found["authority"]
    if "@" in authority:
        raise refuse("names a user", "leave out what stands before the @")
    name, colon, port = authority.partition(":")
    host = host_of(name)
    if host is None:
        raise refuse("names no host that is fetched from", "hosts are given by name, not by number")
    if colon and not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise refuse("has no port that is one")
    target = found["target"] or "/"
    return Address(scheme, host, int(port) if colon else PORTS[scheme], target if target[0] == "/" else f"/{target}")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: of no private or inner network, not the machine itself, no
    group of machines, and none that holds an IPv4 address which might be any of these."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # with a zone (fe80::1%eth0) among others
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return found.is_global and not any(found in network for network in _REFUSED_V4)
    if found.scope_id is not None or found not in _GLOBAL_V6 or not found.is_global:
        return False
    inside = (int(found) >> 32) & 0xFFFF_FFFF
    return inside not in _ISATAP and not any(found in network for network in _REFUSED_V6)
