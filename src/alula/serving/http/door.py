"""What stands before all routes: which names the server is asked under, which pages may ask, who may, and the headers
that every answer carries. Plain ASGI, so that clients that go away are seen by what answers them."""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from alula.errors import quoted
from alula.serving.http.metrics import Metrics
from alula.serving.http.problems import Problem
from alula.serving.http.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GONE = 499
"""status under which metrics count requests whose client went away, as nginx does"""

GUARDED = ("/v1/", "/alula/", "/metrics")
"""how paths begin that ask for the token; the others hold nothing: the page's own files and /health"""
SIGNED = "/alula/v1/runs/files/"
"""how paths begin that bring a signature in the token's place"""

_CONTENT_SECURITY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    b"content-security-policy": _CONTENT_SECURITY.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"permissions-policy": b"microphone=(self), camera=(), geolocation=()",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}
"""of every answer that does not set them itself"""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = "GET, POST, DELETE"


class Door:
    """ASGI middleware.

    Args:
        app: behind it.
    """

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan; uvicorn is told to take no websockets
            await self.app(scope, receive, send)
            return
        headers = _headers(scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else f"req-{secrets.token_hex(12)}"
        origin = headers.get("origin")
        more = {b"x-request-id": request_id.encode()}
        if origin is not None:
            more[b"vary"] = b"Origin"
        if origin in self.settings.origins:
            assert origin is not None
            more |= {
                b"access-control-allow-origin": origin.encode("latin-1"),
                b"access-control-expose-headers": b"x-request-id, retry-after",
            }
        status = GONE

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name.lower() for name, _ in message.get("headers", ())}
                added = [(name, value) for name, value in (_HEADERS | more).items() if name not in own]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        try:
            try:
                self._check(scope, headers, origin)
            except Problem as problem:
                await respond(problem, sent)
                return
            if scope["method"] == "OPTIONS":
                await self._preflight(origin, sent)
                return
            await self.app(scope, receive, sent)
        finally:
            self.metrics.answered(scope["path"], status)

    def _check(self, scope: Scope, headers: dict[str, str], origin: str | None) -> None:
        if "transfer-encoding" in headers and "content-length" in headers:
            # who reads one of them ends the request elsewhere than who reads the other (RFC 9112, 6.3)
            raise Problem(
                "this request has Content-Length and Transfer-Encoding, and which says where it ends is not told",
                code="invalid_http",
                headers={"connection": "close"},
            )
        host = headers.get("host", "")
        settings, path = self.settings, scope["path"]
        if settings.hosts is not None and _name_in(host) not in settings.hosts:
            raise Problem(
                f"this server is not called {quoted(host, 80)}",
                status=421,
                code="unknown_host",
                remedy="whoever runs it may name it: --server-name NAME",
            )
        if origin is not None and origin not in settings.origins and not _is_own(origin, host):
            raise Problem(
                f"pages of {quoted(origin, 80)} may not ask this server",
                status=403,
                code="origin_not_allowed",
                remedy="whoever runs it may name origins: --allow-origin ORIGIN",
            )
        is_guarded = path.startswith(GUARDED) and not path.startswith(SIGNED) and scope["method"] != "OPTIONS"
        if settings.token is not None and is_guarded:
            scheme, _, shown = headers.get("authorization", "").partition(" ")
            # both as bytes: text that is not ASCII is no argument of compare_digest
            is_right = hmac.compare_digest(shown.strip().encode(), settings.token.encode())
            if scheme.lower() != "bearer" or not is_right:
                raise Problem(
                    "the token is missing or wrong",
                    status=401,
                    code="invalid_api_key",
                    remedy="send it as Authorization: Bearer TOKEN (api_key of OpenAI's clients)",
                    headers={"www-authenticate": "Bearer"},
                )

    async def _preflight(self, origin: str | None, send: Send) -> None:
        if origin is None or origin not in self.settings.origins:
            await respond(Problem("nothing is asked with OPTIONS here", status=405, headers={"allow": _METHODS}), send)
            return
        headers = [
            (b"access-control-allow-methods", _METHODS.encode()),
            # `*` does not stand for authorization; the others are what OpenAI's clients send
            (b"access-control-allow-headers", b"authorization, *"),
            (b"access-control-max-age", b"600"),
        ]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


async def respond(problem: Problem, send: Send) -> None:
    """Answer with a problem."""
    body = json.dumps(problem.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in problem.headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _name_in(host: str) -> str:
    """The name in a Host header, without its port."""
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) and not host.endswith("]") else host
    return name.lower().removesuffix(".")


def _is_own(origin: str, host: str) -> bool:
    """Whether a page came from the server itself: its origin is the host that it asks."""
    scheme, _, authority = origin.partition("://")
    return scheme in ("http", "https") and authority.lower() == host.lower()
