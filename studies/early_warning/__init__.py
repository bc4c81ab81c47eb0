"""How early, and how reliably, do the probes of the retention monitor tell that text will be lost?"""

from studies.early_warning.plan import WarningPlan
from studies.early_warning.record import WarningRecord
from studies.early_warning.report import figures, report, table, verdict
from studies.early_warning.study import early_warning, gather

__all__ = ["WarningPlan", "WarningRecord", "early_warning", "figures", "gather", "report", "table", "verdict"]
