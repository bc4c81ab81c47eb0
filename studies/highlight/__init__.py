"""Does the answer follow the highlight? Prompt Highlighter and its rivals on the microworld."""

from studies.highlight.plan import ARMS, HighlightPlan
from studies.highlight.record import HighlightRecord
from studies.highlight.report import figures, markdown, report, table, verdict
from studies.highlight.study import highlight

__all__ = ["ARMS", "HighlightPlan", "HighlightRecord", "figures", "highlight", "markdown", "report", "table", "verdict"]
