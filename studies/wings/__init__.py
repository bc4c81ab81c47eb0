"""What in Wings keeps the words: the paper's table on the microworld, at matched learning rates."""

from studies.wings.arms import ARMS, QUESTIONS, WINGS
from studies.wings.plan import WingsPlan

__all__ = ["ARMS", "QUESTIONS", "WINGS", "WingsPlan"]
