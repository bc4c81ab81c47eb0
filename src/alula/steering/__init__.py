"""Steering: have a model look at what somebody pointed at, while it reads and answers. Nothing is trained, and behind
the block the host is bit for bit what it was.
"""

from alula.steering.block import HIGHLIGHTED, Highlight, Method
from alula.steering.contrast import Distorted, Hidden, noised
from alula.steering.highlight import highlight
from alula.steering.keys import KeyDirections
from alula.steering.prompt import Prompt
from alula.steering.regions import Box, Frames, Mask, Polygon, Seconds, Whole
from alula.steering.shift import Shift
from alula.steering.spans import Span

__all__ = [
    "HIGHLIGHTED",
    "Box",
    "Distorted",
    "Frames",
    "Hidden",
    "Highlight",
    "KeyDirections",
    "Mask",
    "Method",
    "Polygon",
    "Prompt",
    "Seconds",
    "Shift",
    "Span",
    "Whole",
    "highlight",
    "noised",
]
