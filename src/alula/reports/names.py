"""What reports call models that are known by their directories."""

from __future__ import annotations

import re
from pathlib import PurePath

_LINKS = ("final", "latest")
"""what every run calls its newest model"""


def short_names(one: str, other: str) -> tuple[str, str]:
    """The last parts of two paths, as few as tell them apart; run and stage of models that lie in runs of alula."""
    parts, others = _told(one), _told(other)
    for count in range(1, max(len(parts), len(others)) + 1):
        short, short_other = "/".join(parts[-count:]), "/".join(others[-count:])
        if short != short_other:
            return short, short_other
    return one, other


def short_name(path: str) -> str:
    """The last part of a path that says something."""
    return _told(path)[-1] if path else path


def _told(path: str) -> tuple[str, ...]:
    """The parts of a path that say something: ``runs/x/stages/01-align/model`` -> ``runs, x, align``."""
    parts = PurePath(path).parts
    if len(parts) > 3 and parts[-3] == "stages" and parts[-1] == "model":
        # the stage alone does not say whose it is
        return (*parts[:-4], f"{parts[-4]}/{re.sub(r'^[0-9]+-', '', parts[-2])}")
    return parts[:-1] if len(parts) > 1 and parts[-1] in _LINKS else parts
