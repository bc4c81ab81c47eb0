"""What in Wings keeps the words: the paper's table on the microworld, at matched learning rates."""

from studies.wings.arms import ARMS, QUESTIONS
from studies.wings.plan import WingsPlan
from studies.wings.report import figures, markdown, report, table, verdict
from studies.wings.study import gather, wings

__all__ = ["ARMS", "QUESTIONS", "WingsPlan", "figures", "gather", "markdown", "report", "table", "verdict", "wings"]
