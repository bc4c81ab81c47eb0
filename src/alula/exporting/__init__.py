"""Tuned models as others take them: merged into one, in one directory, on the hub."""

from alula.exporting.export import export_model
from alula.exporting.hub import push_model
from alula.exporting.merge import merge_model

__all__ = ["export_model", "merge_model", "push_model"]
