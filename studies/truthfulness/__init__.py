"""Does learning from pictures make a model more truthful, as "Sight Beyond Text" (Tu et al., 2023) has it?"""

from studies.truthfulness.arms import ARMS
from studies.truthfulness.plan import TruthPlan
from studies.truthfulness.record import TruthRecord
from studies.truthfulness.report import figures, markdown, report, table, verdict
from studies.truthfulness.study import truthfulness

__all__ = [
    "ARMS", "TruthPlan", "TruthRecord", "figures", "markdown", "report", "table", "truthfulness", "verdict",
]  # fmt: skip
