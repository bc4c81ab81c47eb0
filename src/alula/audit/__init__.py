"""What any image host does with images and what it kept of its words: text answers and all probes over one model.

`audit` measures, `audit_report` draws one HTML page of it. Nothing is trained, and the model is left as it was.
"""

from alula.audit.export import audit_json
from alula.audit.plan import SECTIONS, Plan
from alula.audit.record import Audit, Memory, TextAnswers
from alula.audit.report import audit_report
from alula.audit.run import audit
from alula.audit.verdicts import Finding, findings

__all__ = [
    "SECTIONS",
    "Audit",
    "Finding",
    "Memory",
    "Plan",
    "TextAnswers",
    "audit",
    "audit_json",
    "audit_report",
    "findings",
]
