"""What a section says for this model, in a line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from alula.stats import Estimate


class Status(StrEnum):
    """How a section turned out; "open": the data does not decide."""

    FINE = "fine"
    LOOK = "look"
    ACT = "act"
    OPEN = "open"


@dataclass(frozen=True)
class Finding:
    """A section in a line.

    Attributes:
        section: of `alula.auditing.SECTIONS`.
        title: the section's question.
        status: fine, look, act or open.
        figure: the number it rests on, with its interval.
        against: what the number is held against: a null, a chance level, the base.
        says: what that means for this model.
        do: what to do about it.
    """

    section: str
    title: str
    status: Status
    figure: str
    against: str
    says: str
    do: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "status": str(self.status)}


def number(value: float, digits: int = 2) -> str:
    """A number to so many decimals, or "undefined"."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "undefined"


def interval(estimate: Estimate, digits: int = 2) -> str:
    """``0.12 (0.08 to 0.16)``."""
    if not math.isfinite(estimate.low):
        return number(estimate.value, digits)
    return f"{number(estimate.value, digits)} ({number(estimate.low, digits)} to {number(estimate.high, digits)})"
