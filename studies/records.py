"""What every study's record says of how it was made."""

from __future__ import annotations

import datetime
from typing import Any

from alula.evaluation.results import Record
from alula.training.environment import readable_environment


class StudyRecord(Record):
    """A study's outcome.

    Attributes:
        command: the line that repeats it.
        created: when it was written, in UTC.
        environment: releases and machine.
        seconds: that its work took, over all calls.
        settings: of its plan, seeds included.
    """

    command: str
    created: str
    environment: dict[str, str]
    seconds: float
    settings: dict[str, Any]


def origin(command: str, seconds: float) -> dict[str, Any]:
    """Fields of a `StudyRecord` written now, but for the settings."""
    return {
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": readable_environment(),
        "seconds": seconds,
    }
