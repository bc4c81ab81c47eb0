"""One encoder for all media: what of OneLLM's ablations holds here."""

from studies.universal.plan import UniversalPlan
from studies.universal.record import UniversalRecord
from studies.universal.report import figures, markdown, report, table, verdict
from studies.universal.study import universal

__all__ = ["UniversalPlan", "UniversalRecord", "figures", "markdown", "report", "table", "universal", "verdict"]
