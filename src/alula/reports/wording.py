"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alula.evaluation.results import Estimate
from alula.stats import Side

MISSING = "n/a"
_LARGE = 5.0
"""nats of which e to the power is too long a number"""
STARRED = "* nothing was lost (lower bound) or gained (upper bound): the exact binomial bound, not the bootstrap's"
"""what the star of `bounds` means"""
_GAP = "\N{NO-BREAK SPACE}"


def percent(share: float | None, digits: int = 1) -> str:
    """``0.9731`` -> ``"97.3 %"``; only an exact 1 is shown as 100."""
    if share is None:
        return MISSING
    value = 100 * share
    shown = round(value, digits)
    if shown == 100 and value < 100 - 1e-9:
        shown = 100 - 10**-digits  # 99.97 must not read as "nothing lost"
    return f"{shown:.{digits}f}{_GAP}%"


def bounds(estimate: Estimate | None, exact: Sequence[Side] = ()) -> str:
    """The interval of a share in percent: ``"96.1 to 98.2"``.

    Args:
        exact: sides that hold an exact bound (`alula.evaluation.results.Comparison`), which get a `STARRED` star.
    """
    if estimate is None:
        return ""
    low, high = (
        ("unbounded" if math.isnan(bound) else f"{100 * bound:.1f}") + ("*" if side in exact else "")
        for side, bound in (("low", estimate.low), ("high", estimate.high))
    )
    return f"{low} to {high}"


def points(estimate: Estimate) -> str:
    """A difference of shares in percentage points: ``"-2.3"``."""
    return f"{100 * estimate.value:+.1f}"


def ratio_of_perplexities(nats: float, digits: int = 2) -> str:
    """A difference in nats per token as a ratio: ``0.3`` -> ``"1.35"``; a power of e where it is large."""
    if math.isnan(nats):
        return MISSING
    return f"e^{nats:.1f}" if abs(nats) > _LARGE else f"{math.exp(nats):.{digits}f}"


def probability(p: float) -> str:
    """``"p < 0.001"`` or ``"p = 0.03"``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def count(number: float) -> str:
    """``1234567`` -> ``"1.2 M"``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            value = number / (1e3 if unit == "k" else limit)
            return f"{value:.{0 if value >= 100 else 1}f} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """``75`` -> ``"1 min 15 s"``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def listing(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def rates(learning_rates: dict[str, float]) -> str:
    """``{"projector": 1e-3, "llm": 5e-4}`` -> ``one line per part, one figure where all agree."""
    if not learning_rates:
        return MISSING
    shown = {part: f"{rate:.3g}" if rate >= 0.01 else _exponent(rate) for part, rate in learning_rates.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return "\n".join(f"{part} {rate}" for part, rate in shown.items())


def _exponent(rate: float) -> str:
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
