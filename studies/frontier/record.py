"""What the frontier leaves behind: an ablation's record, and what was measured of the trainings beside it."""

from __future__ import annotations

from pydantic import Field

from alula.reports.outcome import Outcome


class FrontierOutcome(Outcome):
    """The record of the frontier.

    Attributes:
        divergence: arm -> seed -> KL(base || tuned) on held-out visual questions, in nats per answer token.
        later: arm, or base -> seed -> share right of the visual questions when they come a turn later.
        costs: arm -> per round side by side, its training time as a multiple of full tuning's.
    """

    divergence: dict[str, dict[int, float]] = Field(default_factory=dict)
    later: dict[str, dict[int, float]] = Field(default_factory=dict)
    costs: dict[str, list[float]] = Field(default_factory=dict)
