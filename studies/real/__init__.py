"""What does it cost in words to give a real language model eyes, and by which way of tuning?

SmolLM2-135M-Instruct, an ImageNet net and pictures of things, as ``alula real prepare`` makes them: connector alone,
full tuning, LoRA, Wings, text replay and MKS2 at equal data, steps and rates, measured paired on what the decoder could
do before (BLiMP, CoDa, GSM8K, chat formats) and on pictures of things that no training showed.
"""

from studies.real.plan import RealPlan
from studies.real.record import RealRecord
from studies.real.report import figures, markdown, report, table, verdict
from studies.real.study import real

__all__ = ["RealPlan", "RealRecord", "figures", "markdown", "real", "report", "table", "verdict"]
