"""What the study of highlights measures: trained models under every way to point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.bounds import check_count
from alula.errors import UsageError
from studies.plan import StudyPlan

MODEL = "full"
"""the quickstart's method whose models are measured: full tuning, which sees best"""


@dataclass(frozen=True)
class Arm:
    """A way to point.

    Attributes:
        method: "none", "shift", "hidden", "distorted" or "keys".
        beta: the paper's: attention times so much; of "keys" the gain.
        guidance: None: the method has none.
    """

    method: str
    beta: float | None = None
    guidance: float | None = None

    @property
    def name(self) -> str:
        parts = [self.method]
        if self.beta is not None:
            parts.append(f"{'g' if self.method == 'keys' else 'b'}{self.beta:g}")
        if self.guidance is not None:
            parts.append(f"c{self.guidance:g}")
        return "-".join(parts)

    @property
    def strength(self) -> float | None:
        """As `alula.highlight` takes it."""
        return self.beta if self.beta is None or self.method == "keys" else math.log(self.beta)


PAPER = Arm("shift", 2.0, 1.3)
"""the paper's own setting"""
BETAS, GUIDANCES = (1.0, 2.0, 5.0, 20.0), (1.0, 1.3, 2.0, 3.0)
ARMS = (
    Arm("none"),
    *(Arm("shift", beta, guidance) for beta in BETAS for guidance in GUIDANCES if (beta, guidance) != (1.0, 1.0)),
    *(Arm("hidden", None, guidance) for guidance in (1.5, 2.0)),
    Arm("distorted", None, 2.0),
    *(Arm("keys", gain) for gain in (1.0, 3.0)),
)
SHOWN = (ARMS[0], PAPER, Arm("shift", 20.0, 1.0))
"""the arms whose answers a report shows beside pictures"""


@dataclass(frozen=True)
class HighlightPlan(StudyPlan):
    """Models of a lent quickstart, each asked the same questions under every arm.

    Attributes:
        arms: names of `ARMS`; with none, all. No highlight is always among them.
        items: questions of every kind.
        task_seed: of the questions.
    """

    arms: tuple[str, ...] = ()
    items: int = 100
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.items, "items")
        unknown = [name for name in self.arms if name not in [arm.name for arm in ARMS]]
        if unknown:
            names = ", ".join(arm.name for arm in ARMS)
            raise UsageError(f"there is no arm {unknown[0]!r}", remedy=f"choose among {names}")
        missing = [seed for seed in self.seeds if not self.model(seed).is_dir()]
        if missing:
            raise UsageError(
                f"there is no trained model of seed {missing[0]}",
                where=str(self.reuse),
                remedy="run `alula quickstart --seeds ...` and give its directory by --reuse",
            )

    @property
    def facts(self) -> dict[str, Any]:
        arms = [arm.name for arm in self.chosen]
        return {**super().facts, "study": "highlight", "arms": arms, "items": self.items, "task_seed": self.task_seed}

    @property
    def chosen(self) -> list[Arm]:
        """The arms that models are asked under."""
        return [arm for arm in ARMS if not self.arms or arm is ARMS[0] or arm.name in self.arms]

    def model(self, seed: int) -> Path:
        """The trained model of a seed."""
        holder = self.own if self.lent is None else self.lent
        return holder.run_directory(seed, MODEL) / "final"

    @property
    def shown(self) -> Path:
        """The file of questions to look at, as the first seed answers them."""
        return self.own.seed_directory(self.seeds[0]) / "shown.json"

    def measured(self, seed: int) -> Path:
        """The file of what was measured of a seed's model."""
        return self.own.seed_directory(seed) / "highlight.json"
