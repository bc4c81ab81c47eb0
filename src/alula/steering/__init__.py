"""Steering: have a model look at what somebody pointed at, while it reads and answers. Nothing is trained, and behind
the block the host is bit for bit what it was.
"""

from alula.steering.block import HIGHLIGHTED, Highlight, Method
from alula.steering.highlight import highlight
from alula.steering.shift import Shift

__all__ = ["HIGHLIGHTED", "Highlight", "Method", "Shift", "highlight"]
