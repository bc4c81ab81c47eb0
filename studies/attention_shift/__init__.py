"""Does attention shift say how well a tuned model still reads? (Wings, section 2.2)"""

from studies.attention_shift.plan import ShiftPlan
from studies.attention_shift.record import ShiftRecord
from studies.attention_shift.report import figures, report, table, verdict
from studies.attention_shift.study import attention_shift, gather

__all__ = ["ShiftPlan", "ShiftRecord", "attention_shift", "figures", "gather", "report", "table", "verdict"]
