"""What the policy study trains and measures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alula.bounds import check_count
from alula.errors import UsageError
from alula.jobs import Job
from alula.training import train
from alula_fledgling.quickstart import Plan
from studies.plan import StudyPlan, logged_steps
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

MODEL = "full"
"""the quickstart's method whose models are measured: full tuning, which sees best"""
PARTS = ("shares", "layers", "withdrawal", "skips", "turns", "pictures", "text")
TALKED = (0.22,)
"""shares asked in conversations"""


@dataclass(frozen=True)
class PoliciesPlan(StudyPlan):
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

    def model(self, seed: int) -> Path:
        """The trained model of a seed."""
        return self._holder(seed).run_directory(seed, MODEL) / "final"

    def measured(self, seed: int) -> Path:
        """Where what was measured of a seed's model is kept."""
        return self.own.seed_directory(seed) / "measured"

    def training_jobs(self) -> list[Job]:
        """Trainings that no lent quickstart has done."""
        missing = [seed for seed in self.seeds if self._holder(seed) is self.own]
        connectors = [job for job in self.align_jobs() if job.arguments[1] in missing]
        return connectors + [
            Job(
                title=self.training(seed),
                call=train_model,
                arguments=(self, seed),
                size=self.recipe(seed, MODEL, MODEL).stages[-1].steps or 0,
                done=partial(_trained, self, seed),
                after=self.after_align(seed),
            )
            for seed in missing
        ]

    def after_training(self, seed: int) -> tuple[str, ...]:
        """What a job must come after that needs the model of ``seed``."""
        return (self.training(seed),) if self._holder(seed) is self.own else ()

    def training(self, seed: int) -> str:
        """Title of the job that trains a seed's model."""
        return f"{MODEL}, seed {seed}"

    def _holder(self, seed: int) -> Plan:
        lent = self.lent
        has = lent is not None and (lent.run_directory(seed, MODEL) / "final").is_dir()
        return lent if lent is not None and has else self.own


def train_model(plan: PoliciesPlan, seed: int) -> None:
    """Train the model of a seed."""
    train(plan.recipe(seed, MODEL, MODEL), quiet=True)


def _trained(plan: PoliciesPlan, seed: int) -> int:
    return logged_steps(plan.recipe(seed, MODEL, MODEL))
