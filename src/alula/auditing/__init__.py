"""What any image host does with images and what it kept of its words: text answers and all probes over one model.

`audit` measures, `audit_report` draws one HTML page of it. Nothing is trained, and the model is left as it was.
"""

from alula.auditing.export import audit_json, findings
from alula.auditing.finding import Finding, Status
from alula.auditing.plan import Plan
from alula.auditing.record import Audit, Memory
from alula.auditing.report import audit_report
from alula.auditing.run import audit
from alula.auditing.sections import SECTIONS, Section

__all__ = [
    "SECTIONS",
    "Audit",
    "Finding",
    "Memory",
    "Plan",
    "Section",
    "Status",
    "audit",
    "audit_json",
    "audit_report",
    "findings",
]
