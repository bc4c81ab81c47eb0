"""Errors of the engine and of alula as answers of HTTP."""

from __future__ import annotations

import logging

from alula.errors import AlulaError, DataError, HostError, UsageError
from alula.serving.engine import EngineClosed, QueueFull, RequestError, UnknownModel
from alula.serving.http.problems import Problem
from alula.serving.http.schema import Own

_log = logging.getLogger(__name__)
_RETRY = "1"
"""seconds after which it is worth to ask again"""


def problem_of(error: BaseException) -> Problem:
    """What is answered where ``error`` was raised. What nobody expected goes to the log, and not to the client."""
    match error:
        case Problem():
            return error
        case QueueFull():
            return queue_full()
        case UnknownModel():
            return Problem(error.message, status=404, param="model", code="model_not_found", remedy=error.remedy)
        case EngineClosed():
            return Problem("the server is stopping", status=503, code="stopping", headers={"retry-after": _RETRY})
        case RequestError():
            return Problem(error.message, param=_param(error.where), code="invalid_value", remedy=error.remedy)
        case UsageError() | HostError() | DataError():
            return Problem(error.message, code="invalid_request", remedy=error.remedy)
        case AlulaError():
            _log.error("%s", error)
            return Problem(error.message, status=500, code="server_error")
        case _:
            _log.error("an unexpected error while a request was answered", exc_info=error)
            return Problem("an unexpected error, which the server's log tells", status=500, code="server_error")


def queue_full(why: str = "too many requests wait") -> Problem:
    """429."""
    return Problem(
        why,
        status=429,
        code="queue_full",
        remedy=f"try again after {_RETRY} s or later",
        headers={"retry-after": _RETRY},
    )


def deadline_passed(seconds: float | None, *, is_streamed: bool = False) -> Problem:
    """504."""
    within = f" of {seconds:g} seconds" if seconds is not None else ""
    return Problem(
        f"the answer was not whole by its deadline{within}",
        status=504,
        code="deadline_exceeded",
        remedy="ask for fewer tokens"
        if is_streamed
        else "ask for fewer tokens, or stream the answer: what is there by then is kept",
    )


def _param(where: str | None) -> str | None:
    """The field of a request that an engine's name of it stands for."""
    if where is None:
        return None
    field, _, within = where.partition(": ")
    own = f"alula.{field}" if field in Own.model_fields else field
    return f"{own}.{within}" if within else own
