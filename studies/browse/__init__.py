"""Does reading everything once help to look: browse-and-concentrate against the same host without it."""

from studies.browse.plan import BrowsePlan
from studies.browse.record import BrowseRecord
from studies.browse.report import figures, markdown, report, table, verdict
from studies.browse.study import browse

__all__ = ["BrowsePlan", "BrowseRecord", "browse", "figures", "markdown", "report", "table", "verdict"]
