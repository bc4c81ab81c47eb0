"""Read-only, streaming measurements of any supported host: what happens to images and words inside."""

from alula.probes.alignment import Alignment, AlignmentResult
from alula.probes.attention import AttentionShift, AttentionShiftResult
from alula.probes.base import Probe, watch
from alula.probes.geometry import Geometry, GeometryResult
from alula.probes.lens import LensResult, VocabularyLens
from alula.probes.nulls import noise_prompt, untrained_connector
from alula.probes.overlap import Overlap, OverlapResult
from alula.probes.registry import load_probe, probe_names, register
from alula.stats import Curve, Estimate, Resampling, Result
from alula.weights import WeightMask

__all__ = [
    "Alignment",
    "AlignmentResult",
    "AttentionShift",
    "AttentionShiftResult",
    "Curve",
    "Estimate",
    "Geometry",
    "GeometryResult",
    "LensResult",
    "Overlap",
    "OverlapResult",
    "Probe",
    "Resampling",
    "Result",
    "VocabularyLens",
    "WeightMask",
    "load_probe",
    "noise_prompt",
    "probe_names",
    "register",
    "untrained_connector",
    "watch",
]
