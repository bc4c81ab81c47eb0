"""What implicit alignment of images with text says of a model (IMA): five questions, over trainings and seeds."""

from alula.studies.alignment.plan import CONFIGURATIONS, AlignmentPlan
from alula.studies.alignment.record import AlignmentRecord
from alula.studies.alignment.report import figures, report, table, verdict
from alula.studies.alignment.study import alignment, gather

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
