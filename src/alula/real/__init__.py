"""Real pretrained weights and real data out of packages: one directory to train and measure on.

alula holds none of it and fetches none of it.
"""

from alula.real.packages import Package, find
from alula.real.preparing import PARTS, Part, Prepared, prepare

__all__ = ["PARTS", "Package", "Part", "Prepared", "find", "prepare"]
