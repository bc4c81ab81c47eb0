"""Text retention and probes measured while a stage trains, and the run held to a budget (`retention:` in a recipe)."""

from alula.training.retention.measurement import Measurement, ProbeSet, RetentionEvaluator, open_probe_set
from alula.training.retention.monitor import RetentionMonitor
from alula.training.retention.storage import Stopped, read_start, retention_record

__all__ = [
    "RetentionMonitor",
    "RetentionEvaluator",
    "Measurement",
    "ProbeSet",
    "Stopped",
    "open_probe_set",
    "read_start",
    "retention_record",
]
