"""Truthfulness and ethics by likelihood: a model is asked nothing, its words for each answer are weighed.

`read_truthfulness` reads the published files of TruthfulQA and ETHICS, `evaluate_likelihood` puts them (or questions of
one's own, `ChoiceTask`) to a model. Beside every score stand the figures by which a shift in answer habit is told from
better answers (`ratios_of`).
"""

from alula.evaluation.likelihood.files import read_truthfulness, refuse_doubles
from alula.evaluation.likelihood.questions import ChoiceTask, Question
from alula.evaluation.likelihood.run import evaluate_likelihood, openings_of
from alula.evaluation.likelihood.scores import TOPIC, ratios_of

__all__ = [
    "TOPIC",
    "ChoiceTask",
    "Question",
    "evaluate_likelihood",
    "openings_of",
    "ratios_of",
    "read_truthfulness",
    "refuse_doubles",
]
