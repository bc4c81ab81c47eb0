"""What the policy study trains and measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alula.bounds import check_count
from alula.errors import UsageError
from studies.plan import TunedPlan
from studies.policies.rows import (
    CHAINED,
    SHARES,
    WAYS,
    Row,
    Way,
    knee_rows,
    layer_rows,
    share_rows,
    skip_rows,
    withdrawal_rows,
)

PARTS = ("shares", "layers", "withdrawal", "skips", "turns", "pictures", "text")
TALKED = (0.22,)
"""shares asked in conversations"""


@dataclass(frozen=True)
class PoliciesPlan(TunedPlan):
    """Trained models under policies.

    Attributes:
        parts: names of `PARTS`; more may join in a later call.
        ways: names of `WAYS`; with none, all.
        shares: of image tokens that stay.
        items: questions about one picture per kind.
        pairs: pictures about which two questions are asked; there are as many conversations over several pictures.
        task_seed: of the questions.
    """

    parts: tuple[str, ...] = PARTS
    ways: tuple[str, ...] = ()
    shares: tuple[float, ...] = SHARES
    items: int = 40
    pairs: int = 60
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for found, known, what in ((self.parts, PARTS, "part"), (self.ways, [way.name for way in WAYS], "criterion")):
            unknown = [name for name in found if name not in known]
            if unknown:
                raise UsageError(f"there is no {what} {unknown[0]!r}", remedy=f"choose among {', '.join(known)}")
        if not all(0 < share < 1 for share in self.shares):
            raise UsageError("a share of image tokens that stays is between 0 and 1")
        if odd := [share for share in self.shares if share != round(share, 2)]:
            raise UsageError(
                f"shares are told apart by whole percents, and {odd[0]} is between two of them",
                remedy=f"give {round(odd[0], 2)}",
            )
        check_count(self.items, "items")
        check_count(self.pairs, "pairs")

    @property
    def facts(self) -> dict[str, Any]:
        return {
            **super().facts,
            "study": "policies",
            "items": self.items,
            "pairs": self.pairs,
            "task_seed": self.task_seed,
        }

    @property
    def chosen(self) -> list[Way]:
        """The ways to prune."""
        return [way for way in WAYS if not self.ways or way.name in self.ways]

    @property
    def rows(self) -> list[Row]:
        """Every policy that single questions are asked under."""
        found: list[Row] = []
        if "shares" in self.parts:
            found += [*share_rows(self.chosen, self.shares), *knee_rows()]
        if "layers" in self.parts:
            found += layer_rows()
        if "withdrawal" in self.parts:
            found += withdrawal_rows()
        if "skips" in self.parts:
            found += skip_rows()
        return found

    @property
    def talked(self) -> list[Row]:
        """Every policy that conversations are held under."""
        ways = [way for way in self.chosen if way.name in CHAINED]
        return share_rows(ways, [share for share in TALKED if share in self.shares])
