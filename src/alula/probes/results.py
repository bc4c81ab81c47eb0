"""What probes return: plain frozen dataclasses of numbers that turn into JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """Base of all results."""

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values; undefined numbers (NaN, infinities) become None."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class Estimate(Result):
    """A number with a bootstrap interval over samples; `low` and `high` are NaN where none can be given."""

    value: float
    low: float = math.nan
    high: float = math.nan


Curve = tuple[Estimate, ...]
"""One estimate per layer or state."""


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
