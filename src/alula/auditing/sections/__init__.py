"""The sections of an audit, one file each; a new one is a file and a name below.

Packages installed beside alula add theirs by the entry point group ``alula.sections``, each a `Section`, which come
behind alula's own in the report.
"""

from alula import plugins
from alula.auditing.sections.alignment import ALIGNMENT
from alula.auditing.sections.attention import ATTENTION
from alula.auditing.sections.base import Measurement, Pass, Questions, Section
from alula.auditing.sections.geometry import GEOMETRY
from alula.auditing.sections.lens import LENS
from alula.auditing.sections.overlap import OVERLAP
from alula.auditing.sections.text import TEXT

_REGISTRY: plugins.Registry[Section] = plugins.Registry("alula.sections", "section of audits")
for _section in (TEXT, ATTENTION, ALIGNMENT, GEOMETRY, LENS, OVERLAP):
    _REGISTRY.register(_section.name, _section)

SECTIONS = {section.name: section for section in map(_REGISTRY.get, _REGISTRY.names()) if section is not None}
"""by name, in the order of the report"""

__all__ = ["SECTIONS", "Measurement", "Pass", "Questions", "Section"]
