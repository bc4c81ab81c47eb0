"""Is the subnetwork of pictures that of words (IMA), what dies first when weights go, and what healing forgets."""

from studies.subnetwork.plan import PARTS, SubnetworkPlan
from studies.subnetwork.record import SubnetworkRecord
from studies.subnetwork.report import figures, markdown, report, table, verdict
from studies.subnetwork.study import gather, subnetwork

__all__ = [
    "PARTS",
    "SubnetworkPlan",
    "SubnetworkRecord",
    "figures",
    "gather",
    "markdown",
    "report",
    "subnetwork",
    "table",
    "verdict",
]
