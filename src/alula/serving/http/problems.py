"""Errors as OpenAI's clients read them: a status, and ``{"error": {"message", "type", "param", "code"}}``.

What alula knows beyond that, the remedy, stands beside it under ``alula``; ``message`` holds it as well, since most
clients show nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alula.errors import AlulaError, visible

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
"""``type`` of an error by its status; of all others ``invalid_request_error``"""

MOST_WORDS = 2_000
"""characters of a message: what clients send may stand in it"""


class Problem(AlulaError):  # noqa: N818 - as RFC 9457 calls it
    """A request that is not answered.

    Args:
        message: what is wrong.
        status: of HTTP.
        param: the field of the request, as ``messages[0].content[1].image_url.url``.
        code: a word for programs.
        remedy: what whoever asked can do.
        headers: that go with the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        remedy: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, where=param, remedy=remedy)
        self.status, self.code, self.headers = status, code, dict(headers or {})

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.message, self.status, self.where, self.code, self.remedy, self.headers)

    def body(self) -> dict[str, Any]:
        """What is sent."""
        said = f"{self.where}: {self.message}" if self.where else self.message
        message = f"{said}; remedy: {self.remedy}" if self.remedy else said
        error: dict[str, Any] = {
            "message": visible(message)[:MOST_WORDS],
            "type": KINDS.get(self.status, "invalid_request_error"),
            "param": self.where,
            "code": self.code,
        }
        if self.remedy:
            error["alula"] = {"remedy": visible(self.remedy)[:MOST_WORDS]}
        return {"error": error}


def _rebuild(
    message: str, status: int, param: str | None, code: str | None, remedy: str | None, headers: Mapping[str, str]
) -> Problem:
    return Problem(message, status=status, param=param, code=code, remedy=remedy, headers=headers)


def refused(error: AlulaError, param: str) -> Problem:
    """An error of alula's about a field of the request, which names its place in it."""
    return Problem(error.message, param=param, code="invalid_value", remedy=error.remedy)
