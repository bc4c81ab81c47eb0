"""What an engine refuses, so that a server can tell one refusal from another."""

from __future__ import annotations

from alula.errors import AlulaError, UsageError


class QueueFull(AlulaError):  # noqa: N818 - as `queue.Full`, which it is for requests
    """As many requests wait as may: try again later."""


class UnknownModel(UsageError):  # noqa: N818
    """No model of that name is loaded."""


class RequestError(UsageError):
    """A request that cannot be answered as it is: too long, too many images, a medium that the model does not take."""


class EngineClosed(AlulaError):  # noqa: N818
    """The engine was closed before the answer was there."""
