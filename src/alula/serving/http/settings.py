"""What whoever starts the server decides."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from alula.errors import UsageError
from alula.serving.http.addresses import Allowed, host_of

MEGABYTE = 1 << 20
LEAST_TOKEN = 16
"""characters of a token: shorter ones are guessed"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a server.

    Attributes:
        token: what clients have to show; None: nothing.
        hosts: names in the ``Host`` header that are answered; None: any. A server for this machine alone answers to
            its own names, so that no page of the web reaches it under a name of its choice (DNS rebinding).
        origins: pages of other origins that may ask from a browser (CORS).
        allowed: hosts of the web that media are fetched from.
        may_load: models may be loaded and unloaded by request.
        adapters: the directory below which lies what may be loaded.
        runs: the directory of which audits and reports are shown.
        body_bytes: of a request.
        body_seconds: in which it has to be there.
        media_bytes: of one medium, once decoded from base64, uploaded or fetched.
        seconds_per_sound, rate_of_sound: length, and samples a second, that a sound may have.
        frames_per_video, pixels_per_frame: stored frames that a video may have, and width x height of one.
        pixels_per_request: width x height of all images of a request together.
        uploads: how many are kept at once; older ones go first.
        upload_seconds: for which one is kept.
        stalled_seconds: after which a client that takes nothing of its answer is left.
        pulse_seconds: after which a stream that waits says that it is there, since proxies cut silent ones off.
        demo: pictures and questions are offered on the page.
    """

    token: str | None = None
    hosts: frozenset[str] | None = None
    origins: frozenset[str] = frozenset()
    allowed: Allowed = field(default_factory=Allowed)
    may_load: bool = False
    adapters: Path | None = None
    runs: Path | None = None
    body_bytes: int = 64 * MEGABYTE
    body_seconds: float = 60.0
    media_bytes: int = 32 * MEGABYTE
    seconds_per_sound: float = 120.0
    rate_of_sound: int = 192_000
    frames_per_video: int = 300
    pixels_per_frame: int = 1_920 * 1_080
    pixels_per_request: int = 128_000_000
    uploads: int = 64
    upload_bytes: int = 256 * MEGABYTE
    upload_seconds: float = 3_600.0
    stalled_seconds: float = 60.0
    pulse_seconds: float = 15.0
    demo: bool = False

    def __post_init__(self) -> None:
        if self.token is not None and (len(self.token) < LEAST_TOKEN or not _is_sendable(self.token)):
            raise UsageError(
                f"a token has {LEAST_TOKEN} characters or more, printable ones of ASCII without spaces",
                where="token",
                remedy="python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one",
            )
        if self.may_load and self.adapters is None:
            raise UsageError(
                "nothing may be loaded without a directory below which it lies",
                where="--allow-load",
                remedy="add --adapters DIRECTORY",
            )


def _is_sendable(token: str) -> bool:
    return all("!" <= character <= "~" for character in token)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_names(host: str, more: tuple[str, ...]) -> frozenset[str] | None:
    """The names a server on ``host`` is asked under.

    Args:
        more: other names that lead to it, such as a proxy's.

    Raises:
        UsageError: one of them is no name.
    """
    for name in more:
        if host_of(name) is None:
            raise UsageError(f"{name!r} is no name of a host", where="--server-name")
    if not is_loopback(host) and not more:
        return None
    own = {host.lower(), "localhost", "127.0.0.1", "[::1]"} if is_loopback(host) else set()
    return frozenset(own | {name.lower().removesuffix(".") for name in more})


def check_exposure(host: str, token: str | None) -> None:
    """Refuse to be open to other machines without a token.

    Raises:
        UsageError: it would be.
    """
    if token is None and not is_loopback(host):
        raise UsageError(
            f"on {host} every machine that reaches this one could ask",
            where="--host",
            remedy="put a token into a file of yours alone and add --token-file FILE, or set ALULA_SERVE_TOKEN",
        )


def check_origin(text: str) -> str:
    """An origin as browsers send it.

    Raises:
        UsageError: it is none.
    """
    scheme, separator, authority = text.lower().partition("://")
    name, colon, port = authority.partition(":")
    is_port = not colon or (port.isascii() and port.isdecimal())
    if scheme not in ("http", "https") or not separator or not is_port or not re.fullmatch(r"[a-z0-9.-]+", name):
        raise UsageError(
            f"{text!r} is no origin",
            where="--allow-origin",
            remedy="write https://example.org or http://localhost:3000",
        )
    return text.lower()
