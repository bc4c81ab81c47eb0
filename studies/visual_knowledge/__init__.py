"""Does stored sight help words? MKS2 and its rivals on knowledge that only pictures tell."""

from studies.visual_knowledge.arms import ARMS
from studies.visual_knowledge.plan import KnowledgePlan
from studies.visual_knowledge.record import KnowledgeRecord
from studies.visual_knowledge.report import figures, markdown, report, table, verdict
from studies.visual_knowledge.study import visual_knowledge

__all__ = [
    "ARMS", "KnowledgePlan", "KnowledgeRecord", "figures", "markdown", "report", "table", "verdict",
    "visual_knowledge",
]  # fmt: skip
