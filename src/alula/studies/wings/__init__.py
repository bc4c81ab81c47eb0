"""What in Wings keeps the words: the paper's table on the microworld, at matched learning rates."""

from alula.studies.wings.arms import ARMS, QUESTIONS
from alula.studies.wings.plan import WingsPlan
from alula.studies.wings.report import figures, markdown, report, table, verdict
from alula.studies.wings.study import gather, wings

__all__ = ["ARMS", "QUESTIONS", "WingsPlan", "figures", "gather", "markdown", "report", "table", "verdict", "wings"]
