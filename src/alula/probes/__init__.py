"""Read-only, streaming measurements of any supported host: what happens to images and words inside."""

from alula.probes.attention import AttentionShift, AttentionShiftResult
from alula.probes.base import Probe, watch
from alula.probes.resampling import Resampling
from alula.probes.results import Curve, Estimate, Result

__all__ = ["AttentionShift", "AttentionShiftResult", "Curve", "Estimate", "Probe", "Resampling", "Result", "watch"]
