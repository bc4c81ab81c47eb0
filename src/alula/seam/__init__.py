"""The one place that touches transformers internals: attention function, forward context, cache layer, taps."""

from alula.seam.attention import ATTENTION, KeyColumns, LearnerColumns, use_attention
from alula.seam.forward import Forward, RowCache
from alula.seam.install import NAME, Seam, find, install
from alula.seam.scope import marked, marks
from alula.seam.taps import TapEvent, taps

__all__ = [
    "ATTENTION",
    "NAME",
    "Forward",
    "KeyColumns",
    "LearnerColumns",
    "RowCache",
    "Seam",
    "TapEvent",
    "find",
    "install",
    "marked",
    "marks",
    "taps",
    "use_attention",
]
