"""What any image host does with images and what it kept of its words: text answers and all probes over one model.

`audit` measures, `audit_report` draws one HTML page of it. Nothing is trained, and the model is left as it was.
"""

from alula.auditing.export import audit_json
from alula.auditing.plan import SECTIONS, Plan
from alula.auditing.record import Audit, Memory, TextAnswers
from alula.auditing.report import audit_report
from alula.auditing.run import audit
from alula.auditing.verdicts import Finding, findings

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
