"""What a host's config says of the grafts and policies on the host.

Stock ways of saving (`save_pretrained`, Trainer) write a graft's weights among the host's, and the host's config beside
them. Weights alone do not say how they are used, and policies have none, so the config does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from alula.seam.context import NAME

DECLARED = "alula_grafts"  # the config's key: settings of each graft by its name
POLICIES = "alula_policies"  # the same of policies
_WEIGHT = re.compile(rf"(?:^|\.)layers\.(\d+)\.{NAME}\.([^.]+)\.(.+)")
_OF_DECODER = re.compile(rf"(?:^|\.)[^.\d]+\.{NAME}\.([^.]+)\.(.+)")


def declare(host: Any, name: str, facts: Mapping[str, Any], *, key: str = DECLARED) -> None:
    """Have `host`'s config say under `key` what it takes to attach `name` again (JSON values)."""
    setattr(host.config, key, {**declared(host.config, key), name: dict(facts)})


def retract(host: Any, name: str, *, key: str = DECLARED) -> None:
    """Undo `declare`."""
    left = {other: facts for other, facts in declared(host.config, key).items() if other != name}
    if left:
        setattr(host.config, key, left)
    elif hasattr(host.config, key):
        delattr(host.config, key)


def declared(config: Any, key: str = DECLARED) -> dict[str, Any]:
    """What `config` says under `key`, by name; empty where it says nothing, or nothing that could be read."""
    found = getattr(config, key, None)
    return found if isinstance(found, dict) else {}


def grafted_weights(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The weights of grafts among those of a host: for each graft the given names by those of `Graft.state_dict`."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _WEIGHT.search(name):
            found.setdefault(match[2], {})[f"layers.{match[1]}.{match[3]}"] = name
        elif match := _OF_DECODER.search(name):
            found.setdefault(match[1], {})[f"decoder.{match[2]}"] = name
    return found
