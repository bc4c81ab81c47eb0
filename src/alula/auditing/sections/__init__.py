"""The sections of an audit, one file each; a new one is a file and a line here."""

from alula.auditing.sections.alignment import ALIGNMENT
from alula.auditing.sections.attention import ATTENTION
from alula.auditing.sections.base import Measurement, Pass, Questions, Section
from alula.auditing.sections.geometry import GEOMETRY
from alula.auditing.sections.lens import LENS
from alula.auditing.sections.overlap import OVERLAP
from alula.auditing.sections.text import TEXT

SECTIONS = {section.name: section for section in (TEXT, ATTENTION, ALIGNMENT, GEOMETRY, LENS, OVERLAP)}
"""by name, in the order of the report"""

__all__ = ["SECTIONS", "Measurement", "Pass", "Questions", "Section"]
