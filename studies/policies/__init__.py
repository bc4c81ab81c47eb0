"""Do policies keep answers? Their papers' claims, each on the microworld, beside plain down-sampling and chance."""

from studies.policies.plan import PARTS, PoliciesPlan
from studies.policies.record import PoliciesRecord
from studies.policies.report import figures, markdown, report, table, verdict
from studies.policies.study import gather, policies

__all__ = [
    "PARTS",
    "PoliciesPlan",
    "PoliciesRecord",
    "figures",
    "gather",
    "markdown",
    "policies",
    "report",
    "table",
    "verdict",
]
