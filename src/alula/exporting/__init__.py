"""Tuned models as others take them: merged into one, in one directory, for other engines, on the hub."""

from alula.exporting.engines import ENGINES, check_for, export_for
from alula.exporting.export import export_model
from alula.exporting.hub import push_model
from alula.exporting.merge import merge_model
from alula.exporting.requirements import Requirement, Verdict

__all__ = [
    "ENGINES",
    "Requirement",
    "Verdict",
    "check_for",
    "export_for",
    "export_model",
    "merge_model",
    "push_model",
]
