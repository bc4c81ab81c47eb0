"""Results as something to look at: one HTML page that needs nothing else, and tables for the terminal."""

from alula.reports.document import Document, Section, render
from alula.reports.experiment import document, experiment_report
from alula.reports.outcome import BaseOutcome, CurvePoint, MethodOutcome, Outcome, SeedOutcome, read_curve

__all__ = [
    "BaseOutcome",
    "CurvePoint",
    "Document",
    "MethodOutcome",
    "Outcome",
    "Section",
    "SeedOutcome",
    "document",
    "experiment_report",
    "read_curve",
    "render",
]
