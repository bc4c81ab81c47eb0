"""An audit as JSON values."""

from __future__ import annotations

from typing import Any

from alula.auditing.record import Audit
from alula.auditing.verdicts import findings


def audit_json(audit: Audit) -> dict[str, Any]:
    """The audit as JSON values; undefined numbers are None."""
    probes = {name: getattr(audit, name) for name in ("attention", "alignment", "geometry", "lens", "overlap")}
    text = audit.text
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
        "text": None
        if text is None
        else {
            "accuracy": {name: task.accuracy for name, task in text.run.tasks.items()},
            "notes": {name: task.notes for name, task in text.run.tasks.items()},
            "paired": None if text.pairs is None else text.pairs.model_dump(mode="json"),
            "after_image": None if text.after_image is None else text.after_image.model_dump(mode="json"),
            "base_asked_in_model_words": text.in_its_words,
        },
        **{name: None if result is None else result.to_dict() for name, result in probes.items()},
        "controls": {name: result.to_dict() for name, result in audit.controls.items()},
        "words": {str(token): word for token, word in audit.words.items()},
        "memory": None
        if audit.memory is None
        else {"held": audit.memory.held, "bound": audit.memory.bound, "peak": dict(audit.memory.peak)},
    }
