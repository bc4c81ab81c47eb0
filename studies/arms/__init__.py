"""Ablations: one base tuned in many ways, the arms, all asked the same questions and compared item by item."""

from studies.arms.ablation import Ablation, Arm, Column, Question, stage
from studies.arms.plan import ArmsPlan
from studies.arms.report import figures, markdown, report, table, tradeoff, verdict
from studies.arms.study import arm_jobs, gather, run

__all__ = [
    "Ablation", "Arm", "ArmsPlan", "Column", "Question", "arm_jobs", "figures", "gather", "markdown", "report", "run",
    "stage", "table", "tradeoff", "verdict",
]  # fmt: skip
