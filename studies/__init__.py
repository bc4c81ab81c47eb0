"""Studies: populations of models trained and measured to answer one question each, on the microworld."""

from studies.plan import StudyPlan

__all__ = ["StudyPlan"]
