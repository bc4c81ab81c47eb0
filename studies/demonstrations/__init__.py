"""What are demonstrations worth, and what of them is left when their pictures go? AIM and its rivals on episodes."""

from studies.demonstrations.plan import SHOTS, WAYS, DemonstrationsPlan
from studies.demonstrations.record import DemonstrationsRecord
from studies.demonstrations.report import figures, markdown, report, table, verdict
from studies.demonstrations.study import demonstrations

__all__ = [
    "SHOTS",
    "WAYS",
    "DemonstrationsPlan",
    "DemonstrationsRecord",
    "demonstrations",
    "figures",
    "markdown",
    "report",
    "table",
    "verdict",
]
