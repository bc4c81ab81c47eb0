"""What the sections say of an audit, and the audit as JSON values."""

from __future__ import annotations

from typing import Any

from alula.auditing.finding import Finding
from alula.auditing.record import Audit
from alula.auditing.sections import SECTIONS


def findings(audit: Audit) -> list[Finding]:
    """One finding per measured section, in the order of the report."""
    made = (section.verdict(audit, audit.results[name]) for name, section in SECTIONS.items() if name in audit.results)
    return [finding for finding in made if finding is not None]


def audit_json(audit: Audit) -> dict[str, Any]:
    """The audit as JSON values; undefined numbers are None."""
    about = ("model", "base", "model_class", "parameters", "layers", "device", "dtype", "created", "command")
    return {
        "format": "alula-audit-1",
        **{name: getattr(audit, name) for name in about},
        "seconds": round(audit.seconds, 1),
        "settings": dict(audit.facts),
        "environment": dict(audit.environment),
        "data": {
            "source": audit.data,
            "measured": audit.measured,
            "without_image": audit.without_image,
            "unusable": audit.unusable,
        },
        "findings": [finding.to_dict() for finding in findings(audit)],
        **{key: value for section in SECTIONS.values() for key, value in section.exported(audit).items()},
        "memory": None
        if audit.memory is None
        else {"held": audit.memory.held, "bound": audit.memory.bound, "peak": dict(audit.memory.peak)},
    }
