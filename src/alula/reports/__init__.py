"""Results as something to look at: one HTML page that needs nothing else, and tables for the terminal."""

from alula.reports.comparison import comparison_outcome, comparison_report
from alula.reports.document import Document, Section, render
from alula.reports.experiment import document, experiment_report
from alula.reports.outcome import BaseOutcome, CurvePoint, MethodOutcome, Outcome, SeedOutcome, read_curve
from alula.reports.ratios import paired_ratio_tables, run_ratio_tables
from alula.reports.single import run_report
from alula.reports.terminal import captions_table, experiment_table, findings_table, run_table

__all__ = [
    "BaseOutcome",
    "CurvePoint",
    "Document",
    "MethodOutcome",
    "Outcome",
    "Section",
    "SeedOutcome",
    "captions_table",
    "comparison_outcome",
    "comparison_report",
    "document",
    "experiment_report",
    "experiment_table",
    "findings_table",
    "paired_ratio_tables",
    "read_curve",
    "render",
    "run_ratio_tables",
    "run_report",
    "run_table",
]
