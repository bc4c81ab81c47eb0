"""What implicit alignment of images with text says of a model (IMA): five questions, over trainings and seeds."""

from studies.alignment.plan import CONFIGURATIONS, AlignmentPlan
from studies.alignment.record import AlignmentRecord
from studies.alignment.report import figures, report, table, verdict
from studies.alignment.study import alignment, gather

__all__ = [
    "CONFIGURATIONS",
    "AlignmentPlan",
    "AlignmentRecord",
    "alignment",
    "figures",
    "gather",
    "report",
    "table",
    "verdict",
]
