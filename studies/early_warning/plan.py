"""What the early-warning study reads: the watched trainings of the attention-shift study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.errors import UsageError
from alula.files import read_json
from studies.attention_shift import ShiftPlan


@dataclass(frozen=True)
class WarningPlan:
    """The study's settings.

    Attributes:
        output: directory of the record and the report.
        population: the trainings, each watched by the retention monitor as it ran.
        budget: a training has failed whose bare text accuracy at the end is below this share of the base's.
    """

    output: Path
    population: ShiftPlan
    budget: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.budget < 1:
            raise UsageError(f"the budget must lie between 0 and 1, not {self.budget}")

    @property
    def facts(self) -> dict[str, Any]:
        """The settings that decide what is computed, as JSON values."""
        return {"study": "early-warning", "budget": self.budget, "population": self.population.facts}

    @classmethod
    def over(
        cls, output: Path, population: Path, *, seeds: tuple[int, ...], reuse: Path | None = None, **options: Any
    ) -> WarningPlan:
        """Take the population that is in a directory, whatever its settings, or plan the usual one to be trained there.

        Raises:
            UsageError: the directory holds something that is no such population.
        """
        found: dict[str, Any] = {}
        mark = population / "plan.json"
        if mark.is_file():
            facts = read_json(mark)
            if facts.get("study") != "attention-shift" or "watched_every" not in facts:
                raise UsageError(
                    "holds no population of watched trainings",
                    where=str(population),
                    remedy="name the directory of `python -m studies attention-shift`, or an empty one",
                )
            found = {name: facts[name] for name in ("items", "samples", "task_seed", "steps")}
            found |= {name: tuple(facts[name]) for name in ("texts", "rates")}
        return cls(output, ShiftPlan(output=population, seeds=seeds, reuse=reuse, **found), **options)
