"""Every word and full sight: which way of giving a decoder eyes keeps what it said and sees as well as full tuning."""

from studies.frontier.arms import ARMS, DISTILLED, FRONTIER, PLAIN
from studies.frontier.plan import FrontierPlan
from studies.frontier.record import FrontierOutcome
from studies.frontier.study import frontier

__all__ = ["ARMS", "DISTILLED", "FRONTIER", "PLAIN", "FrontierOutcome", "FrontierPlan", "frontier"]
