"""Tuned models as others take them: merged into one, in one directory, on the hub."""

from alula.handing.export import export_model
from alula.handing.hub import push_model
from alula.handing.merge import merge_model

__all__ = ["export_model", "merge_model", "push_model"]
